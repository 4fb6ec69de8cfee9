"""The report: what it measures against definitions, and one page that says it, loads nothing and escapes everything."""

import base64
import dataclasses
import fnmatch
import json
import os
import re
import shutil
import subprocess
import tomllib
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.errors import UserError
from experiments.data import listops as expressions
from experiments.evaluation.evaluator import evaluate_run, seal
from experiments.explaining import page as why
from experiments.reports import measure, page, pictures, writer
from experiments.reports.history import read_history
from experiments.reports.writer import write_report
from experiments.tasks import base, pathfinder, retrieval, speech_commands
from experiments.training.restore import Run, load
from seqboat.ops.packing import row_info
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend
from tests.helpers import grid

# What it measures


def batches(size, total):
    """Rows 0, 1, ... and a last batch filled up with rows of weight 0."""
    for first in range(0, total, size):
        numbers = np.arange(first, first + size)
        yield {"inputs": numbers[:, None], "weights": (numbers < total).astype(np.float32)}


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 20))
def test_examples_are_spread_over_the_split(size, total, count):
    found, counted = measure.spread(batches(size, total), count)
    numbers = list(found)
    assert numbers == [int(example["inputs"][0]) for example in found.values()]
    assert counted == total
    assert len(numbers) == min(count, total)
    assert numbers[0] == 0
    gaps = np.diff([*numbers, total])
    assert gaps.min() > 0
    assert gaps.max() <= 2 * total / max(len(numbers) - 1, 1)


WINDOWS = [Window(size, causal, "softmax", "none") for size in (None, 1, 3) for causal in (False, True)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_reach_is_the_farthest_element_that_attention_sees(window):
    active = np.random.default_rng(0).random((4, 20)) < np.array([[0.1], [0.4], [0.9], [0]])
    expected = []
    for row in active:
        rows = row_info(jnp.asarray(row)[None])
        visible = np.asarray(window.visible(rows, rows))
        place = np.arange(20)
        distance = np.where(visible, np.abs(place[:, None] - place[None]), 0).max(1)
        expected += distance[row].tolist()
    assert measure.reach(window, active).tolist() == expected


@pytest.mark.parametrize(
    ("function", "position"),
    grid(
        [("softmax", "relative"), ("softmax", "rotary"), ("relu2", "none"), ("laplace", "slot")],
        ("softmax", "relative"),
        ("relu2", "none"),
    ),
)
def test_mean_distance_is_weighted_by_attention(function, position, monkeypatch):
    """The weights are read from `attend` with the unit vectors as values."""
    monkeypatch.setattr(measure, "QUERIES", 8)
    rng = np.random.default_rng(1)
    length, window = 24, Window(3, function == "relu2", function, position)
    q, k = (jnp.asarray(rng.normal(size=(length, 4)), jnp.float32) for _ in "qk")
    sizes = {"relative": 2 * length - 1, "slot": 6 * 3 - 1}
    table = jnp.asarray(rng.normal(size=sizes[position]), jnp.float32) if position in sizes else None
    distances = jax.jit(lambda active: measure.mean_distance(window, table, q, k, active))
    weigh = jax.jit(
        lambda rows: attend(window, table, *(window.apply_rotary(x, rows) for x in (q, k)), jnp.eye(length), rows, rows)
    )
    for share in (0.15, 0.9):
        active = rng.random(length) < share
        found = np.asarray(distances(jnp.asarray(active)))
        weights = np.asarray(weigh(row_info(jnp.asarray(active)[None])), np.float64)
        place = np.flatnonzero(active)
        if len(place) > 8:
            place = place[((np.arange(8) + 0.5) * len(place) / 8).astype(int)]
        distance = np.abs(np.arange(length)[:, None] - np.arange(length)[None])
        with np.errstate(invalid="ignore"):
            expected = ((weights * distance).sum(1) / weights.sum(1))[place]
        np.testing.assert_allclose(found[: len(place)], expected, rtol=1e-4, atol=1e-5)
        assert np.isnan(found[len(place) :]).all()


def test_an_attended_distance_stands_for_its_sequences_elements():
    distance = np.array([[1.0, 2.0], [5.0, np.nan], [np.nan, np.nan]])
    active = np.array([[1] * 6, [0] * 5 + [1], [0] * 6], bool)
    span = measure.Span(np.zeros(0), *measure.attended(distance, active))
    assert span.weights.tolist() == [3, 3, 1]
    mean, low, median, high, top = pictures.summary(span, "attends")
    assert mean == pytest.approx((3 * 1 + 3 * 2 + 5) / 7)
    assert (low, median, high, top) == (1, 2, 5, 5)
    assert pictures.summary(span, "may read") is None


# Runs of every kind


@pytest.fixture
def measured(monkeypatch) -> list[measure.Measured]:
    """What reports measure, as they do."""
    found: list[measure.Measured] = []
    original = measure.measure
    monkeypatch.setattr(measure, "measure", lambda *a: found.append(original(*a)) or found[-1])
    return found


@pytest.fixture(scope="module")
def run(recorded, tmp_path_factory) -> Path:
    return Path(shutil.copytree(recorded, tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def loaded(run) -> Run:
    return load(run)


@pytest.fixture(scope="module")
def looked(loaded) -> measure.Measured:
    return measure.measure(loaded, "test", 12)


def test_rates_are_those_of_evaluation(run, loaded, looked, monkeypatch):
    """All 40 examples, in batches of another size, the last of them filled up."""
    monkeypatch.setattr(measure, "ELEMENTS", 12 * looked.valid.shape[1])
    whole = measure.measure(loaded, "test", 40, 3)
    assert {margin.position for margin in whole.margins} == {3}
    result = evaluate_run(run)
    np.testing.assert_allclose(whole.rates(), result["activation_rate"], rtol=1e-5)
    assert whole.total == looked.total == 40
    for name in ("loss", "accuracy"):
        assert whole.metrics[name] == pytest.approx((result[name], result["standard_errors"][name]), rel=1e-5)
    active = whole.confidence[whole.active].mean()
    expected = np.average(result["confidence"], weights=result["activation_rate"])
    assert active == pytest.approx(expected, rel=1e-5)
    (run / f"evaluation_test_{result['step']}.json").unlink()


def check_margins(found, count):
    assert len(found) == count
    for margin in found:
        assert margin.channels.sum() + margin.bias == pytest.approx(margin.logits, rel=1e-4, abs=1e-6)
        assert np.abs(margin.channels).min() > 0


def test_a_margin_is_the_sum_over_channels(loaded, looked):
    check_margins(looked.margins, 2)
    for margin in looked.margins:
        first = looked.active[margin.series, 0]
        assert first[margin.position] == (margin.logits > 0)
    with pytest.raises(UserError, match=r"--element=40: the first example has \d+ elements"):
        measure.margins(loaded, {}, 40, 40)


# The page


class Reader(HTMLParser):
    """Tags with attributes, the text between them, and that they are closed in order; white space that only lays out
    the source is left out."""

    VOID = ("meta", "img", "br", "!doctype")

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.marked: dict[str, str] = {}
        self.style = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
        if "style" in self.open or ("\n" in data and not data.strip()):
            return
        self.text.append(data)
        if self.open and self.open[-1] == "mark":
            series = self.tags[-1][1]["class"].split()[0]
            self.marked[series] = self.marked.get(series, "") + data


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SECTIONS = (
    "Activation over training",
    "Activation over position",
    "Confidence",
    "How far attention reaches",
    "Which tokens activate attention",
    "One decision taken apart",
    "Learning curves",
    "The run",
)


def assert_page(path: Path, found: measure.Measured | None = None) -> Reader:
    """Every section is there, nothing is loaded or run, every picture is an SVG that loads nothing either."""
    reader = Reader(path.read_text())
    assert not path.with_suffix(".partial").exists()
    joined = "\n".join(reader.text)
    for title in SECTIONS:
        assert title in reader.text, title
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for name, attributes in reader.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "action")], name
        if "src" in attributes:
            head, data = attributes["src"].split(",", 1)
            assert head == "data:image/svg+xml;base64"
            drawn = base64.b64decode(data).decode()
            assert not re.findall(r'(?:href|src)="(?!#|data:)', drawn)
            assert attributes["alt"]
    policies = [a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [POLICY]
    assert ".card" in reader.style
    assert "url(" not in reader.style
    assert "nan" not in joined.lower().split()
    if found is not None:
        for name, rate in zip(found.names, found.rates(), strict=True):
            assert name in reader.text
            assert page.percent(rate) in reader.text
    return reader


def test_the_page_of_a_trained_run(run, loaded, looked):
    reader = assert_page(write_report(run, examples=12), looked)
    text = " ".join("".join(reader.text).split())
    accuracy, error = looked.metrics["accuracy"]
    assert f"{accuracy:.3f} ± {error:.3f}" in text
    assert f"{loaded.task.baseline('test')['accuracy']:.3f}" in text
    assert "always the most common class" in text
    assert "12 of 40 examples" in text
    # The marked symbols of four examples, of each layer.
    task = loaded.task
    for series in range(2):
        wanted = ""
        for number in (0, 4, 7, 11):
            example = looked.examples[number]
            on = looked.active[series, number, : int(example["lengths"])]
            wanted += "".join(task.symbol(int(i)) for i in example["inputs"][: len(on)][on])
        assert reader.marked.get(f"s{series}", "") == wanted
    assert "model.window_size" in reader.text
    for margin in looked.margins:
        assert f"{margin.logits:+.4f}" in text
    assert len([name for name, _ in reader.tags if name == "img"]) == 9


@pytest.mark.breadth  # test_the_page_of_a_trained_run
def test_the_page_is_the_same_again(run, looked, monkeypatch):
    first = write_report(run, examples=12).read_bytes()
    monkeypatch.setattr(measure, "measure", lambda *_: looked)
    write_report(run, examples=12)
    assert (run / "report.html").read_bytes() == first


BLANK = "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()


@pytest.fixture
def undrawn(monkeypatch):
    """Reports whose pictures are empty: drawing takes seconds."""
    monkeypatch.setattr(pictures, "_uri", lambda figure: pictures.plt.close(figure) or BLANK)


@pytest.fixture
def as_looked(loaded, looked, undrawn, monkeypatch):
    """Reports of the trained run, which load and measure nothing again and draw nothing."""
    monkeypatch.setattr(writer, "load", lambda *_: loaded)
    monkeypatch.setattr(measure, "measure", lambda *_: looked)


@pytest.mark.breadth  # test_the_page_of_a_trained_run
def test_the_evaluation_is_shown_where_there_is_one(run, loaded, tmp_path, as_looked):
    workdir = Path(shutil.copytree(run, tmp_path / "run"))
    step = loaded.step
    file = workdir / f"evaluation_test_{step}.json"
    result = {"accuracy": 0.625, "examples": 40, "activation_rate": [0.875, 0.125], "baseline": {"accuracy": 0.4375}}
    result |= {"step": step, "seal": seal(workdir, step)}
    file.write_text(json.dumps(result))
    text = " ".join("".join(assert_page(write_report(workdir)).text).split())
    assert "0.625test accuracy (all 40 examples)0.438accuracy of the baseline" in text
    assert "50 %of tokens activate attention" in text
    assert "layer 188 %layer 212 %" in text
    against = {"workdir": "runs/other/never", "verdicts": ["this run is better: so and so", "b"]}
    for error, shown in ((0.0004, "0.6250 ± 0.0004"), (0.077, "0.625 ± 0.077")):
        file.write_text(json.dumps({**result, "standard_errors": {"accuracy": error}, "against": against}))
        text = " ".join("".join(assert_page(write_report(workdir)).text).split())
        assert shown in text
    assert "Against other/never, example by example:this run is better: so and sobActivation rate alone" in text
    for change, told in (("train.steps: 1 -> 2", False), ("model.activation: 'learned' -> 'never'", True)):
        against["differences"] = [f"config.{change}"]
        file.write_text(json.dumps({**result, "against": against}))
        text = " ".join("".join(assert_page(write_report(workdir)).text).split())
        assert f"config, here → there: config.{change.replace('->', '→')}" in text
        assert ("Activation rate alone does not show that attention helps" in text) == (not told)
    wrong = {"accuracy": "high"}, {"activation_rate": [None, "a"]}, {"standard_errors": None}, {"against": [1]}
    for broken in ("{", "[]", "[" * 100_000, *(json.dumps({**result, **fields}) for fields in wrong)):
        file.write_text(broken)
        with pytest.raises(UserError, match=rf"evaluation_test_{step}.json is (damaged|not an evaluation)"):
            write_report(workdir)


@pytest.mark.breadth  # test_evaluation.py: test_a_result_is_of_one_checkpoint
def test_another_checkpoints_evaluation_is_not_shown(run, loaded, tmp_path, as_looked, caplog):
    """Of another step, of other parameters, and one that does not say."""
    workdir = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html")))
    step = loaded.step
    other = next(n for n in (2, 4, 6) if n != step)
    ours = {"step": step, "accuracy": 0.625, "examples": 40, "seal": seal(workdir, step)}
    file = workdir / f"evaluation_test_{step}.json"
    for change in ({"step": other}, {"seal": seal(workdir, other)}, {"seal": None}, {"step": 5, "seal": ""}):
        file.write_text(json.dumps({**ours, **change}))
        caplog.clear()
        assert "0.625" not in write_report(workdir, out=tmp_path / "page.html").read_text()
        (record,) = caplog.records
        assert f"{file} is ignored" in record.getMessage()
    assert not (workdir / "report.html").exists()
    file.write_text(json.dumps(ours))
    assert "0.625" in write_report(workdir, out=tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_not_measured_for(run, tmp_path, as_looked, monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=f"could not write in {tmp_path}/file: Not a directory; choose another path with --out=FILE"
    ):
        write_report(run, out=tmp_path / "file" / "page.html")


def test_a_run_without_records_and_one_that_is_still_training(run, tmp_path, as_looked):
    workdir = Path(shutil.copytree(run, tmp_path / "run"))
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    text = " ".join("".join(assert_page(write_report(workdir, examples=2)).text).split())
    assert "training is at step 4 of 6" in text
    foreign = '{"step": 5, "kind": "train", "loss": null, "activation_rate": "much"}\n{"step": 6, "kind": "train"}\n'
    (workdir / "metrics.jsonl").write_text(foreign + '{"step": 7, "loss"')
    text = "".join(assert_page(write_report(workdir, examples=2)).text)
    assert text.count("The work directory has no training records.") == 2
    (workdir / "metrics.jsonl").unlink()
    text = "".join(assert_page(write_report(workdir, examples=2)).text)
    assert text.count("The work directory has no training records.") == 2
    assert "why.html" not in text
    (workdir / "why.html").write_text("")
    assert "why.html, beside this page" in "".join(assert_page(write_report(workdir, examples=2)).text)


def other(tiny, task, model=None, **changes):
    """The tiny config with another task, without what its model does not know."""
    values = tiny(changes)
    known = {name: value for name, value in values["model"].items() if name not in (model or {}).get("without", ())}
    return {**values, "task": task, "model": {**known, **(model or {}).get("with", {})}}


CLASSIFIER_ONLY = ("head", "sinusoid", "embedding_init")


@pytest.mark.breadth  # test_the_page_of_a_trained_run
def test_a_model_without_attention(tiny, untrained, tmp_path):
    never = untrained(tiny({"model.activation": "never"}), tmp_path / "never")
    text = "".join(assert_page(write_report(never, examples=4)).text)
    assert "0 %" in text
    assert "this model has none" in text
    for said in ("This model has no module to activate.", "No token is attended in this model."):
        assert said in text


@pytest.mark.breadth  # test_the_page_of_a_trained_run; test_everything_is_escaped
def test_a_language_model(tiny, untrained, tmp_path, measured, undrawn):
    (tmp_path / "text").write_bytes(b"<b>one & two</b>\n\xff " * 60)
    task = {"name": "corpus", "files": (str(tmp_path / "text"),), "length": 32, "context": 16}
    model = {"without": CLASSIFIER_ONLY, "with": {"name": "language_model", "causal": True}}
    workdir = untrained(other(tiny, task, model), tmp_path / "run")
    path = write_report(workdir, examples=3)
    reader = assert_page(path, measured[0])
    text = "".join(reader.text)
    assert "bits per byte" in text
    assert "<b>one" in "".join(reader.text)
    assert "<b>one" not in path.read_text()
    assert "↵" in text
    assert "·" in text
    assert "before it" in text, "a causal window"


NUMBERS = range(12)


@pytest.fixture
def reports_on(untrained, tmp_path, monkeypatch, measured, undrawn):
    """reports_on(module, source, values): the page, what was measured, and the text, of a task of that module."""

    def report(module, source, values) -> tuple[Reader, measure.Measured, str]:
        monkeypatch.setattr(module, "open_split", lambda *_: source)
        path = write_report(untrained(values, tmp_path / "run"), examples=12)
        assert len(measured) == 1
        assert measured[0].total == len(source)
        reader = assert_page(path, measured[0])
        return reader, measured[0], "".join(reader.text)

    return report


def images(reader: Reader) -> int:
    return len([name for name, _ in reader.tags if name == "img"])


PROTOTYPES = {"with": {"head": {"name": "prototypes", "count": 4}}}
LIKE = 4 * (1 + 3)  # pictures of four examples and of three cases beside each


@pytest.mark.breadth  # test_the_page_of_a_trained_run, test_cases.py
def test_pixels_with_two_modules_and_a_centred_router_and_prototypes(tiny, reports_on):
    rng = np.random.default_rng(0)
    source = [{"image": rng.integers(0, 256, (8, 8), np.uint8), "label": i % 2} for i in NUMBERS]
    values = other(
        tiny,
        {"name": "pathfinder", "resolution": 8},
        PROTOTYPES,
        **{"model.feed_forward_size": 8, "model.router.centered": True},
    )
    reader, found, _ = reports_on(pathfinder, source, values)
    assert found.names == ("layer 1, gau", "layer 1, feed forward", "layer 2, gau", "layer 2, feed forward")
    check_margins(found.margins, 4)
    assert list(found.spans) == ["layer 1, gau", "layer 2, gau"]
    # Position and confidence, spans, four margins, four examples.
    assert images(reader) == 2 + 1 + 4 + 4 + LIKE


@pytest.mark.breadth  # test_the_page_of_a_trained_run, test_cases.py
def test_a_waveform_with_attention_always_and_prototypes(tiny, reports_on):
    rng = np.random.default_rng(0)
    source = [{"audio": rng.normal(size=20 + i), "label": i % 10} for i in NUMBERS]
    values = other(tiny, {"name": "speech_commands", "length": 30}, PROTOTYPES, **{"model.activation": "always"})
    reader, found, text = reports_on(speech_commands, source, values)
    assert found.rates().tolist() == [1, 1]
    assert found.active[:, 3].sum(1).tolist() == [23, 23], "no padding"
    assert '100 %attention is always on (activation="always")' in text
    for said in ("so nothing changes.", "so there is no confidence.", "no activation decisions."):
        assert said in text
    assert re.search(r"votes for \d: training example \d+, class \d", text)
    # Position, spans, four examples.
    assert images(reader) == 1 + 1 + 4 + LIKE


@pytest.mark.breadth  # test_the_page_of_a_trained_run
def test_pairs_of_documents(tiny, reports_on):
    source = [{"text1": b"a" * (5 + i), "text2": b"<c>" * 4, "label": i % 2} for i in NUMBERS]
    model = {"without": CLASSIFIER_ONLY, "with": {"name": "retrieval"}}
    values = other(tiny, {"name": "retrieval", "length": 20}, model)
    reader, found, _ = reports_on(retrieval, source, values)
    assert found.valid.sum(1).tolist() == [length for i in NUMBERS for length in (5 + i, 12)]
    # The symbols marked are those of both documents of four pairs.
    places = [place for number in (0, 4, 7, 11) for place in (2 * number, 2 * number + 1)]
    assert len(reader.marked.get("s0", "")) == found.active[0, places].sum()


HOSTILE = "<script>alert(1)</script><img src=http://x.example/a onerror=alert(2)>\"'&"
# Of a terminal, of direction, a lone surrogate, and Jinja's own.
CONTROL = "\0\x08\x1b[31m\x7f\x9b\u202e\ud800{{ 7 * 7 }}{% raw %}"
VISIBLE = r"\x00\x08\x1b[31m\x7f\x9b\u202e\ud800{{ 7 * 7 }}{% raw %}"


def test_everything_is_escaped(run, looked, tmp_path, monkeypatch, as_looked):
    """Labels, text of examples, metrics, config, command, and the work directory's name are other people's."""
    workdir = Path(shutil.copytree(run, tmp_path / HOSTILE.replace("/", "_")))
    monkeypatch.setattr("experiments.tasks.short_listops.Task.symbol", lambda task, number: HOSTILE)
    monkeypatch.setattr("experiments.tasks.short_listops.Task.baseline_name", HOSTILE)
    metric = HOSTILE + CONTROL
    names = ("<i>a&amp;", "b")
    renamed = dataclasses.replace(
        looked,
        names=names,
        spans=dict(zip(names, looked.spans.values(), strict=True)),
        metrics={metric: looked.metrics["accuracy"]},
    )
    monkeypatch.setattr(measure, "measure", lambda *_: renamed)
    config = {"task": {"name": HOSTILE}, HOSTILE: HOSTILE, CONTROL: CONTROL}
    meta = {"config": config, "command": HOSTILE + CONTROL, "versions": {HOSTILE: HOSTILE}}
    whole = page.Content

    def content(**fields):
        fields["task"].selection_metric = metric
        return whole(**{**fields, "meta": meta, "baseline": {metric: 0.5}})

    monkeypatch.setattr(page, "Content", content)
    path = write_report(workdir, examples=2)
    reader = assert_page(path)
    assert "".join(reader.text).count(HOSTILE) > 100
    assert f"{HOSTILE}{VISIBLE} of the baseline: {HOSTILE}" in reader.text
    for shown in (VISIBLE, repr(CONTROL), HOSTILE + VISIBLE):  # the field, its value, and the command
        assert shown in reader.text
    source = path.read_text()
    assert "<script" not in source
    assert "<img src=http" not in source
    assert not [c for c in source if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"]


def test_the_template_is_installed_too():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, names in ((page, (page.TEMPLATE, "frame.html.j2")), (why, (why.TEMPLATE,))):
        (pattern,) = settings["package-data"][package.__package__]
        assert all(fnmatch.fnmatch(name, pattern) for name in names)


def test_curves_leave_out_what_is_not_theirs(tmp_path):
    records = [
        {"step": 1, "kind": "train", "activation_rate": [0.5, 0.25], "loss": 1.0},
        {"step": 2, "kind": "train", "activation_rate": [0.5, None], "loss": None},
        {"step": 3, "kind": "train", "activation_rate": [0.5, 0.25, 1]},
        {"step": 4, "kind": "evaluation", "activation_rate": [0.1, 0.2], "loss": "x"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    history = read_history(tmp_path, ["a", "b"])
    steps, rates = history.curve("train", "activation_rate")
    assert steps.tolist() == [1, 2]
    np.testing.assert_array_equal(rates, [[0.5, 0.25], [0.5, np.nan]])
    assert history.curve("train", "loss")[1].tolist() == [[1.0]]
    assert history.curve("evaluation", "loss")[1].shape == (0, 1)
    assert history.last_step() == 4


def test_symbols_are_what_people_read(looked, loaded):
    assert (
        "".join(base.byte_symbol(number) for number in (0, *(byte + 1 for byte in b"a <\n\x00\x7f\xff")))
        == "∅a <↵\n···"
    )
    task = loaded.task
    example = looked.examples[0]
    text = "".join(task.symbol(number) for number in example["inputs"][: int(example["lengths"])].tolist())
    assert text.split() == expressions.render(example["inputs"][: int(example["lengths"])].tolist()).split()


def test_colours_are_apart():
    for count in (1, 6, 7, 24):
        assert len({pictures.color(number, count) for number in range(count)}) == count


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


no_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def assert_shown(source: str, images: int, folder: Path) -> None:
    """At two widths every picture is decoded, nothing is wider than the window, and no error is logged: a probe is
    added to a copy of the page, whose policy it loosens for itself alone."""
    probe = """<script>addEventListener("load", () => {
      const broken = [...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length;
      const wide = document.documentElement.scrollWidth > innerWidth;
      document.title = `broken ${broken} wide ${wide} images ${document.images.length} at ${innerWidth}`; })</script>"""
    loosened = source.replace(POLICY, f"{POLICY}; script-src 'unsafe-inline'")
    assert loosened != source
    copy = folder / "page.html"
    copy.write_text(loosened.replace("</body>", probe + "</body>"))
    for width in (500, 1200):  # headless windows are no narrower than 500
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
             f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()],
            capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        assert f"<title>broken 0 wide false images {images} at {width}</title>" in done.stdout, done.stderr[-500:]
        assert "Refused to" not in done.stderr


@pytest.mark.slow
@no_browser
def test_a_browser_shows_the_page(run, tmp_path):
    assert_shown(write_report(run, examples=12).read_text(), 9, tmp_path)
