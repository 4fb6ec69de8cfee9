"""Why a run attends: sums that are the model's margins, flips that interventions confirm, one page, and refusals."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments.common.errors import UserError
from experiments.data import identity
from experiments.evaluation import agreement, explanations, splicing
from experiments.evaluation.explanations import COLUMNS
from experiments.explaining import against, measure, reading, writer
from experiments.explaining import codes as code_table
from experiments.explaining import page as pages
from experiments.explaining.dictionaries import read
from experiments.explaining.words import explaining, words
from experiments.reports import pictures
from experiments.reports.measure import spread
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import build
from experiments.training.restore import bound, load
from tests.experiments.test_activations import values as dictionary_values
from tests.experiments.test_report import BLANK, CONTROL, HOSTILE, POLICY, VISIBLE, Reader, assert_shown, no_browser
from tests.helpers import load_program, random_like

program = load_program("explain")

LOSSES = {"plain": 1.0, "spliced": 1.5, "ablated": 4.0}  # test_splicing.py: that they are


VALUES = {"task.test_examples": 12, "model.router.centered": True}
BIAS = 1.0  # with which random parameters activate some elements of layer 2 and not others


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    return random_run(tmp_path_factory.mktemp("explain") / "run", build(tiny(VALUES)))


@pytest.fixture(scope="module")
def loaded(run):
    """Read once; no test changes it."""
    return load(run)


def random_run(workdir: Path, experiment) -> Path:
    """Its parameters do not depend on its seed."""
    variables = random_like(jax.eval_shape(lambda: experiment.functions.variables(0)))
    logits = variables["params"]["encoder"]["layers"]["sparse"]["configurator"]["logits"]
    logits["bias"] = jnp.zeros_like(logits["bias"]).at[:, 1].set(BIAS)
    return write(workdir, experiment, variables, 4)


def write(workdir: Path, experiment, variables, step: int) -> Path:
    task = experiment.task
    meta = {"config": experiment.values, "versions": {"jax": "1"}, "data": identity.remember(task)}
    best = {"best_metric": task.selection_metric, "higher_is_better": task.higher_is_better}
    with Checkpoints(workdir / "checkpoints", keep=1, **best) as checkpoints:
        checkpoints.save(step, variables, meta, None)
    return workdir


@pytest.fixture(scope="module")
def dictionary(run):
    """Of layer 2, untrained: the experiment and its variables."""
    experiment = build(dictionary_values(run, model__size=24, model__k=4, task__layer=2))
    variables = random_like(jax.eval_shape(lambda: experiment.functions.variables(0)))
    variables["batch_stats"]["norm"] = jnp.ones(())
    return experiment, variables


@pytest.fixture(scope="module")
def given(dictionary, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("given") / "m2", *dictionary, 6)


@pytest.fixture(scope="module")
def read_by(run, tmp_path_factory) -> Path:
    """A dictionary of gated of layer 2, untrained."""
    experiment = build(dictionary_values(run, model__size=20, model__k=4, task__layer=2, task__site="gated"))
    variables = random_like(jax.eval_shape(lambda: experiment.functions.variables(0)))
    variables["batch_stats"]["norm"] = jnp.ones(())
    return write(tmp_path_factory.mktemp("gated") / "g2", experiment, variables, 6)


@pytest.fixture(scope="module")
def codes(run, loaded, tiny, tmp_path_factory) -> Path:
    """The run's parameters, with random codes at m."""
    experiment = build({**tiny(VALUES), "codebook": {**base.codebook().to_dict(), "codes": 30}})
    variables = random_like(jax.eval_shape(lambda: experiment.functions.variables(0)))
    plain = loaded.variables
    variables["params"]["target"] = plain["params"]
    variables["batch_stats"] = {"target": plain["batch_stats"]}
    return write(tmp_path_factory.mktemp("codes") / "codes", experiment, variables, 5)


@pytest.fixture(scope="module")
def measured(run, given, read_by, codes, tmp_path_factory):
    """The page, its numbers, what was measured for it, and by what."""
    found, looks = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splicing, "losses", lambda *_: LOSSES)
        original = measure.explain
        patch.setattr(measure, "explain", lambda *a: looks.append(a[0]) or found.append(original(*a)) or found[-1])
        out = tmp_path_factory.mktemp("page") / "why.html"
        path, numbers, _ = writer.write_explanation(run, [given, read_by], examples=10, out=out, codebook=codes)
    return path, json.loads(numbers.read_text()), found[0], looks[0]


@pytest.fixture(scope="module")
def explained(measured):
    """The page, its numbers, and what was measured for it."""
    return measured[:3]


@pytest.mark.breadth  # tests/interp/test_attribution.py, test_paths.py
def test_both_sums_are_the_models_margins(explained):
    _, why, _ = explained
    (layer,) = why["layers"]
    decision = layer["decision"]
    assert layer["layer"] == 2
    assert 0.05 < layer["rate"] < 0.95
    assert layer["largest_difference"] < 1e-4 * layer["scale"]
    for kind in ("by_feature", "by_source"):
        assert decision[kind]["sum"] == pytest.approx(decision["margin"], abs=1e-4 * layer["scale"])
    terms = decision["by_feature"]
    whole = sum(terms["features"].values()) + terms["constant"] + terms["error"]
    assert whole == pytest.approx(terms["sum"], rel=1e-6)
    assert len(decision["by_source"]["sources"]) > decision["position"]
    assert np.ptp(decision["by_source"]["sources"]) > 0


@pytest.mark.breadth  # tests/models/test_bottlenecked.py
def test_behind_codebooks_the_codes_tell_the_decisions(explained, codes):
    path, why, _ = explained
    assert why["codes"]["workdir"] == str(codes)
    for layer in why["codes"]["layers"]:
        assert layer["information"] == pytest.approx(1) if 0 < layer["rate"] < 1 else layer["information"] is None
        assert 1 < layer["in_use"] <= layer["codes"] == 30
        for code in layer["shown"]:
            assert code["attends"] in (0, 1)  # a code decides alone
            assert (code["excess"] > 0) == (code["attends"] == 1)
            assert code["contexts"]
    assert any(layer["shown"] for layer in why["codes"]["layers"])
    assert f"Code {layer['shown'][0]['code']} of layer 2" in path.read_text()
    mixed = np.array([[0], [0], [1], [1]])
    assert code_table.information(mixed, np.array([True, True, False, False])) == pytest.approx(1)
    assert code_table.information(mixed, np.array([True, False, True, False])) == pytest.approx(0)
    assert code_table.information(mixed, np.ones(4, bool)) is None


@pytest.mark.breadth  # test_another_runs_dictionary_is_refused
def test_codebooks_of_another_model_are_refused(run, loaded, codes):
    with pytest.raises(UserError, match=r"^--codebook: .*run has no codebooks at m"):
        code_table.read(loaded, run)
    other = dataclasses.replace(loaded, values={**loaded.values, "task": {"name": "mqar"}})
    with pytest.raises(UserError, match=r"^--codebook: .* is not of a model as in .*: config\.task"):
        code_table.read(other, codes)
    with pytest.raises(
        UserError, match=r"codes has codebooks at m: explain the run that it began from, with --codebook="
    ):
        read(bound(load(codes)), [run])


@pytest.mark.breadth  # test_attribution.py: test_predicted_flips_are_those_of_taking_the_feature_away
def test_flips_are_those_that_interventions_measure(explained):
    (layer,) = explained[1]["layers"]
    assert layer["shown"]
    for feature in layer["shown"]:
        assert feature["disagree"] == 0
        assert feature["compared"] > 0.9 * layer["elements"]
        near = 1 - feature["compared"] / layer["elements"]
        assert feature["measured_flips"] == pytest.approx(feature["flips"], abs=near + 1e-9)
        assert feature["flips"] == layer["features"]["flips"][feature["feature"]]
    assert max(feature["measured_flips"] for feature in layer["shown"]) > 0
    assert any(feature["loss_without"] != feature["loss"] for feature in layer["shown"])


@pytest.mark.breadth  # test_edits.py: test_a_decision_is_forced_at_one_element_and_nowhere_else
def test_margins_alone_can_be_changed(measured):
    """By less than they are, which changes no decision, and by more, which takes attention from one layer."""
    _, _, found, looks = measured
    (plain,) = looks.without(found.given)
    own, other = (share[plain.valid].mean() for share in plain.active[::-1])
    assert measure.rates([plain]) == pytest.approx([other, own])
    assert 0 < own < 1
    taken = np.maximum(plain.margin, 0)
    less, more = (next(looks.without(found.given, taken=factor * taken)) for factor in (0.5, 2))
    np.testing.assert_array_equal(less.active, plain.active)
    assert not more.active[1].any()
    for look in (less, more):
        np.testing.assert_array_equal(look.active[0], plain.active[0])
        np.testing.assert_array_equal(look.m, plain.m)
        np.testing.assert_array_equal(look.margin, plain.margin)  # before its own edit
    assert len({float(look.loss[0]) for look in (plain, less, more)}) == 3


@pytest.mark.breadth  # test_halves_are_of_examples_and_do_not_depend_on_features; test_chat.py
def test_every_feature_shown_has_words_and_scores(explained):
    path, why, _ = explained
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [(line["site"], line["feature"]) for line in lines] == [
        (site, feature["feature"])
        for site, layers in (("m", why["layers"]), ("gated", why["reading"]))
        for layer in layers
        for feature in layer["shown"]
    ]
    assert {line["site"] for line in lines} == {"m", "gated"}
    parts = {"made_from": 5, "scored_on": 5, "missing": None}
    assert why["explainer"] == {"name": "predicates", "url": None, "usage": None, **parts}
    text = shown_text(path.read_text())
    for line in lines:
        assert line["text"]
        assert line["text"] in text
        assert (line["failed"], line["layer"], line["explainer"]) == (0, 2, "predicates")
        assert line["asked"] > 50
        assert set(line["scores"]) == {*COLUMNS, "detection_f1"}
    for name in ("simulation", "intervention"):
        assert sum(line["scores"][name] is not None for line in lines) > len(lines) / 2
    assert "made from 5 of the sequences and scored on the other 5" in text
    (layer,) = why["layers"]
    change = [feature["loss_decided_without"] - feature["loss"] for feature in layer["shown"]]
    assert any(change)
    assert f"{change[0]:+.4f}" in text


@pytest.mark.breadth  # test_parts_of_a_sum_by_distance_and_symbol; test_attribution.py
def test_what_attention_reads_sums_to_its_output(explained):
    path, why, _ = explained
    (layer,) = why["reading"]
    assert (layer["layer"], layer["size"], layer["examples"]) == (2, 20, 10)
    assert layer["largest_difference"] < 1e-5 * layer["scale"]
    assert 0 < len(layer["shown"]) <= min(layer["alive"], reading.SHOWN)
    assert 0 < layer["active"] < why["layers"][0]["elements"]
    for found in (*layer["shown"], layer["attention"]):
        assert 0 < found["tokens"] <= reading.QUERIES
        for part in ("distances", "symbols"):
            shares = [abs(each["share"]) for each in found[part]]
            assert shares == sorted(shares, reverse=True)
            assert 0 < len(shares) <= reading.LARGEST
            assert sum(shares) < 1 + 1e-6
    assert all(each["share"] > 0 for each in layer["attention"]["distances"]), "weights of a softmax"
    means = [feature["mean"] for feature in layer["shown"]]
    assert means == sorted(means, reverse=True)
    text = shown_text(path.read_text())
    assert f"{layer['alive']} of 20 features fire at the {layer['active']} active tokens of 10 examples" in text


def test_parts_of_a_sum_by_distance_and_symbol():
    terms = np.array([[0, 3.0, -1, 0], [2, 0, 0, 2]])
    places = np.array([0, 1]), np.array([2, 3])
    tokens = np.array([[5, 6, 7, 8], [9, 6, 6, 7]])
    found = reading._shares(terms, places, tokens)
    share = lambda part, name: [(each[name], each["share"] * 8) for each in found[part]]
    assert share("distances", "distance") == [(-1, 3), (-3, 2), (0, 1)]
    assert share("symbols", "symbol") == [(6, 3), (9, 2), (7, 1)]
    assert reading._shares(terms, places, None)["symbols"] == []
    assert reading._shares(np.zeros((0, 4)), places, tokens) == {"distances": [], "symbols": []}


@pytest.mark.breadth
def test_few_examples_are_held_of_long_ones(loaded, read_by, monkeypatch):
    """At least two, for words are made from some and scored on others."""
    loaded = bound(loaded)
    (dictionary,) = read(loaded, [read_by], sites=("gated",))
    examples = list(spread(loaded.task.evaluation_batches("test"), 5)[0].values())
    monkeypatch.setattr(reading, "ELEMENTS", 1)
    monkeypatch.setattr(reading, "SHOWN", 0)
    found = reading.by_source(loaded, dictionary, words(loaded, examples, explaining("predicates")))
    assert (found["examples"], found["shown"]) == (2, [])
    assert found["attention"]["distances"]


@pytest.mark.breadth  # test_halves_are_of_examples_and_do_not_depend_on_features
def test_without_words_the_page_says_why(explained, written):
    _, why, found = explained
    none = {"text": None, "scores": dict.fromkeys(COLUMNS), "asked": 0, "failed": 0}
    values = {**found.values, "shown": [{**feature, **none} for feature in found.values["shown"]]}
    missing = {**why["explainer"], "missing": "The inputs are numbers, which no words describe."}
    layer = dataclasses.replace(found, values=values)
    text = shown_text(written(layer, vocabulary=None, explainer=missing, reading=[]))
    assert "No feature is put into words. The inputs are numbers, which no words describe." in text
    assert "fires where" not in text
    assert "No dictionary of gated was given" in text
    usage = {"calls": 1234, "answers": 7, "kept": 5678, "missing": 0, "failures": {}}
    said = {**why["explainer"], "name": HOSTILE, "url": "http://127.0.0.1:1/v1", "usage": usage}
    shown = [{**feature, **none, "text": HOSTILE} for feature in found.values["shown"]]
    source = written(dataclasses.replace(found, values={**found.values, "shown": shown}), explainer=said)
    text = shown_text(source)
    assert f"as the language model {HOSTILE} says" in text
    assert "called 1,234 times and answered 7; 5,678 answers are from before" in text
    assert text.count(HOSTILE) > len(shown)
    assert "<script" not in source


def test_halves_are_of_examples_and_do_not_depend_on_features(tiny):
    task = type("Task", (), {"config": type("C", (), {"vocabulary_size": 9}), "symbol": str})()
    run = type("Run", (), {"task": task})()
    pair = {"inputs": np.ones((6, 2), int), "lengths": np.array([6, 4])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explanations, "answers", lambda run: False)
        found = words(run, [pair] * 5, explaining("predicates"))
    first = found.parts.first
    assert first.shape == (10,)
    assert sorted(first[::2]) == [False, False, False, True, True]
    np.testing.assert_array_equal(first[::2], first[1::2])  # the documents of a pair
    assert found.parts.made.shown.sum() == 2 * 10
    assert "One example alone is too few" in words(run, [pair], explaining("predicates")).missing
    task.config.vocabulary_size = None
    numbers = words(run, [pair] * 2, explaining("predicates"))
    assert numbers.of("m", 1, None, [3], np.ones((1, 4, 6)), None)[0]["text"] is None
    assert "numbers" in numbers.missing


def test_the_fewest_features_that_decide():
    features = np.array([[3.0, -1, 0.5], [-3, 1, 0], [-1, -2, 4], [0.5, 0.5, 0]])
    active = np.array([True, False, True, True])
    assert measure.sufficient(features, 1.0, active).tolist() == [0, 1, 0, 0]
    assert measure.sufficient(features, -2.0, active).tolist() == [1, 0, 1, np.inf]


def test_features_for_and_against_are_shown_once(monkeypatch):
    monkeypatch.setattr(measure, "SHOWN", 2)
    assert measure.largest(np.array([1.0, 3, 2, -1]), np.array([-1.0, -2, 0, 5])) == [1, 2, 0]
    assert measure.largest(np.array([-1.0, 0]), np.array([0.0, 1])) == []


def checked(text: str) -> Reader:
    reader = Reader(text)
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for name, attributes in reader.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "action")], name
        assert attributes.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    policies = [a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [POLICY]
    return reader


def shown_text(source: str) -> str:
    return " ".join("".join(checked(source).text).split())


@pytest.mark.breadth  # test_the_page_takes_another_run_without_dictionaries
def test_the_page(explained):
    path, why, _ = explained
    source = path.read_text()
    reader = checked(source)
    tables = 6 + sum(bool(layer["shown"]) for layer in why["codes"]["layers"])
    assert source.count('<div class="wide"><table>') == source.count("<table") == tables, "tables scroll on a phone"
    text = " ".join("".join(reader.text).split())
    (layer,) = why["layers"]
    assert "This classifier has 2 layers of 8 channels" in text
    assert (
        f"On these tokens attention is active at 100 % in layer 1, {100 * layer['rates'][1]:.0f} % in layer 2." in text
    )
    assert layer["rates"][1] == layer["rate"]
    for title in ("Features", "What attention reads", "One decision taken apart twice", "Health of the dictionaries"):
        assert title in reader.text
    assert "No dictionary of layer 1 was given, so nothing is said about it." in text
    assert "Layers without a dictionary (1)" in text
    assert f"{100 * layer['kept']['constant']:.1f} % when the constant alone does" in text
    assert f"{layer['decision']['margin']:+.5f}" in text
    assert "1.500loss with the dictionary's reconstruction of m in its place; as it is 1.000" in text
    assert reader.marked["s1"], "contexts of layer 2"
    assert len([name for name, _ in reader.tags if name == "img"]) == 3
    assert why["run"]["seal"]


@pytest.mark.slow
@no_browser
def test_a_browser_shows_the_page(explained, tmp_path):
    assert_shown(explained[0].read_text(), 3, tmp_path)


@pytest.fixture
def written(explained, loaded, monkeypatch):
    """written(explained) is the text of a page of what was measured, changed."""
    monkeypatch.setattr(pictures, "_uri", lambda figure: pictures.plt.close(figure) or BLANK)
    task = lambda vocabulary: type(
        "Task",
        (),
        {"config": type("C", (), {"vocabulary_size": vocabulary}), "symbol": lambda self, number: HOSTILE + CONTROL},
    )()
    _, why, found = explained

    def text(layer=found, vocabulary=9, other=None, **changes) -> str:
        shown = dataclasses.replace(loaded)
        vars(shown)["experiment"] = type("E", (), {"task": task(vocabulary)})
        return pages.page({**why, **changes}, [layer], shown, [(np.ones(40, int), len(found.decision.sources))], other)

    return text


@pytest.mark.breadth  # test_report.py: test_everything_is_escaped
def test_tokens_and_names_are_escaped(explained, written):
    _, why, found = explained
    context = {"sequence": 0, "position": 1, "activation": 1.0, "symbol": HOSTILE, "runs": [(None, HOSTILE + CONTROL)]}
    shown = [{**feature, "contexts": [context]} for feature in found.values["shown"]]
    named = {"workdir": HOSTILE, "step": 6, "rows": "all"}
    layer = dataclasses.replace(found, values={**found.values, "shown": shown, "dictionary": named})
    source = written(layer, command=HOSTILE, run={**why["run"], "workdir": f"x/{HOSTILE.replace('/', '_')}"})
    text = "".join(checked(source).text)
    assert text.count(HOSTILE) > len(shown)
    assert VISIBLE in text
    assert "<script" not in source


@pytest.mark.breadth  # test_the_page_takes_another_run_without_dictionaries
def test_what_is_empty_says_why(explained, written):
    found = explained[2]
    numbers = [{**feature, "contexts": []} for feature in found.values["shown"]]
    decision = found.decision._replace(sources=np.zeros(0), missing="mixer lstm: its output is not such a sum")
    values = {**found.values, "shown": numbers, "rate": 1.0, "decision": decision.values()}
    text = written(dataclasses.replace(found, values=values, decision=decision), vocabulary=None)
    assert "Nothing is decided in layer 2: attention is active at 100 % of the tokens." in text
    assert "There is no sum over source tokens: mixer lstm: its output is not such a sum." in text
    assert "fires at none of these tokens" in text
    assert "No run with codebooks at m was given (--codebook)" in written(codes=None)
    empty = dataclasses.replace(found, values={**found.values, "shown": []})
    assert "No feature of this dictionary adds" in written(empty)


def test_a_mixer_without_a_kernel_has_no_sum_over_sources(loaded, given, monkeypatch):
    from experiments.explaining.decisions import take_apart
    from seqboat.layers.mixer import MixerConfig

    (dictionary,) = read(loaded, [given])
    config = loaded.model.config.encoder.layer
    monkeypatch.setattr(type(config.mixer), "kernel", MixerConfig.kernel)
    zeros = np.zeros((1, 12, config.features), np.float32)
    look = measure.Look(zeros, zeros[..., 0], None, {"ssm_out": zeros[0], "pre_norm": zeros[0]}, None, None)
    found = take_apart(loaded, dictionary, look, 12, 3)
    assert (found.position, found.sources.size, found.values()["by_source"]) == (3, 0, None)
    assert "not a sum over earlier elements" in found.missing
    assert found.features.sum() + found.constant + found.error == pytest.approx(found.source_constant, abs=1e-5)
    with pytest.raises(UserError, match="--element=12: the first example has 12 elements"):
        take_apart(loaded, dictionary, look, 12, 12)


# The other seed


@pytest.fixture(scope="module")
def twin(tiny, tmp_path_factory) -> Path:
    """A run of another seed with the parameters of `run`."""
    return random_run(tmp_path_factory.mktemp("twin") / "twin", build(tiny({**VALUES, "seed": 3})))


@pytest.mark.breadth  # test_the_page_takes_another_run_without_dictionaries
def test_units_and_routes_of_a_run_are_those_of_its_twin(loaded, twin, given, dictionary, tmp_path, written):
    experiment, variables = dictionary
    values = {**experiment.values, "task": {**experiment.values["task"], "run": str(twin)}}
    own = write(tmp_path / "m2", build(values), variables, 6)
    other = against.read_other(loaded, twin, [own])
    examples = list(spread(loaded.task.evaluation_batches("test"), 10)[0].values())
    layers = against.compare(loaded, read(loaded, [given]), other, examples)
    assert [layer.values["kind"] for layer in layers] == ["channels", "features"]
    everywhere, routing = (layer.values["routing"] for layer in layers)
    assert (everywhere["rates"], everywhere["kappa"]) == ([1, 1], 0), "nothing is decided in layer 1"
    assert (routing["kappa"], routing["same"]) == (1, 1)
    assert routing["rates"][0] == routing["rates"][1]
    assert routing["rolled"]["most"] < 0.9
    for layer in layers:
        found = layer.values[layer.values["kind"]]
        assert found["mean"] > 2 * found["rolled"]
        pairs, values = np.array(found["pairs"]), np.array(found["correlations"])
        alive = values > 1e-9
        assert alive.sum() >= 5
        np.testing.assert_allclose(values[alive], 1, atol=1e-6)
        np.testing.assert_array_equal(*pairs[alive].T)
        for pair in layer.texts[:2]:
            assert pair["runs"][0] == pair["runs"][1]
            assert any(shade is not None for shade, _ in pair["runs"][0])
    shown = against.shown(layers, other)
    shown["layers"][1]["texts"][0]["runs"] = [[(1, HOSTILE + CONTROL)]] * 2
    reader = checked(source := written(other={**shown, "name": HOSTILE}))
    text = " ".join("".join(reader.text).split())
    assert "<script" not in source
    assert text.count(HOSTILE) >= 3
    assert "κ = +1.000" in text
    assert "Without dictionaries of layer 1 of both runs" in text
    assert "No other run was given" not in text
    assert "No other run was given (--against=DIR)" in written()


def test_the_page_takes_another_run_without_dictionaries(run, twin, tmp_path):
    path, numbers, lines = writer.write_explanation(run, [], examples=10, out=tmp_path / "why.html", against=twin)
    assert lines.read_text() == ""
    why = json.loads(numbers.read_text())
    assert why["layers"] == []
    assert why["against"]["workdir"] == str(twin)
    assert [layer["routing"]["same"] for layer in why["against"]["layers"]] == [1, 1]
    text = "".join(checked(path.read_text()).text)
    assert "No dictionary of layer 2 was given, so nothing is said about it." in text
    assert "Health of the dictionaries" not in text
    assert "No dictionary of m was given" in text


def test_sequences_are_compared_up_to_their_ends(loaded, twin, monkeypatch):
    """Few enough examples, and nothing of the padding."""
    monkeypatch.setattr(against, "ELEMENTS", 100)
    examples = list(spread(loaded.task.evaluation_batches("test"), 10)[0].values())
    asked = []

    def see(run, batches):
        rows = sum(len(batch["lengths"]) for batch in batches)
        return agreement.Seen(np.zeros((2, rows, length, 3), np.float32), np.zeros((2, rows, length), bool))

    monkeypatch.setattr(agreement, "see", see)
    monkeypatch.setattr(agreement, "routing", lambda a, b, valid, key: asked.append(valid) or {})
    length = examples[0]["inputs"].shape[0]
    against.compare(loaded, (), against.Other(twin, loaded, ()), examples)
    every = -(-10 * length // 100)
    assert every > 1
    assert asked[0].shape == (-(-10 // every), length)
    assert asked[0].sum(1).tolist() == [int(example["lengths"]) for example in examples[::every]]


# Refusals


@pytest.fixture
def once(run, loaded, monkeypatch):
    """The run is not read again for every refusal."""
    monkeypatch.setattr(writer, "load", lambda path, *rest: loaded if path == run else load(path, *rest))


def refused(message: str, run: Path, *paths: Path, **options) -> None:
    with pytest.raises(UserError, match=message) as found:
        writer.write_explanation(run, paths, **options)
    assert "\n" not in str(found.value)
    assert not (run / "why.html").exists()


def test_what_does_not_belong_together_is_refused(run, once, given, dictionary, tmp_path):
    refused("--dictionaries=DIR,DIR is missing", run)
    refused("--against=DIR is missing", run, given, against_paths=[given])
    again = Path(shutil.copytree(given, tmp_path / "again"))
    refused(f"{given} and {again} are both of layer 2, m", run, given, again)
    refused(f"{run} holds a Classifier, not a dictionary of m or gated", run, run)
    experiment, variables = dictionary
    task = {**experiment.values["task"], "site": "resid"}
    resid = write(
        tmp_path / "r", dataclasses.replace(experiment, values={**experiment.values, "task": task}), variables, 6
    )
    refused("is of resid: a router's margin is a sum over features of m, and features of gated show what", run, resid)
    refused("--explainer_model=NAME is missing", run, given, explainer="http://127.0.0.1:9/v1")
    refused("no evaluation split 'tset'", run, given, split="tset")


@pytest.mark.breadth  # test_what_cannot_be_compared_is_refused
def test_another_runs_dictionary_is_refused(run, given, tiny, untrained, tmp_path):
    other = untrained(tiny({**VALUES, "seed": 3}), tmp_path / "o", step=4)
    refused(f"is of step 4 of {run}, not of step 4 of the run in {other}", other, given)
    never = untrained(tiny({**VALUES, "model.activation": "never"}), tmp_path / "never")
    refused("the layers of this model have no router", never, given)
    refused(f"the run in {never}: the layers of this model have no router", run, against=never)


@pytest.fixture
def not_read(loaded):
    """not_read(message, other run, its dictionaries) compares the run with them and is refused."""

    def refused(message: str, path: Path, *dictionaries: Path) -> None:
        with pytest.raises(UserError, match=message) as found:
            against.read_other(loaded, path, dictionaries)
        assert "\n" not in str(found.value)

    return refused


def test_what_cannot_be_compared_is_refused(run, not_read, twin, given, read_by, tmp_path):
    again = Path(shutil.copytree(run, tmp_path / "again"))
    not_read(f"--against={run} is the run itself", run)
    not_read(f"--against={again} is the run itself", again)
    not_read(f"there is no work directory {tmp_path / 'none'}", tmp_path / "none")
    not_read(f"--against_dictionaries: {given} is of step 4 of {run}", twin, given)
    not_read("is of gated: a router's margin is a sum over features of m", twin, read_by)
    not_read(f"--against={given} is of the task activations, and {run} of short_listops", given)


@pytest.mark.breadth  # test_what_cannot_be_compared_is_refused
def test_runs_of_other_sizes_and_damaged_ones_cannot_be_compared(run, not_read, tiny, untrained, tmp_path):
    again = Path(shutil.copytree(run, tmp_path / "again"))
    small = untrained(tiny({**VALUES, "model.layers": 1}), tmp_path / "small")
    not_read(f"--against={small} has 1 layers, and {run} has 2", small)
    longer = untrained(tiny({**VALUES, "task.tokens": "40-128"}), tmp_path / "longer")
    not_read(f"--against={longer} is of another task than {run}: config.task.tokens: '8-40' -> '40-128'", longer)
    for path in again.rglob("state/d/*"):
        path.write_bytes(b"")
    not_read("damaged|differs|truncated", again)


def test_the_program_hands_its_flags_on(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(program, "write_explanation", lambda *a: asked.append(a) or ("a.html", "a.json", "a.jsonl"))
    flags = {"workdir": str(run), "dictionaries": ["a", "b"], "examples": 3, "element": 2}
    flags |= {"against": "c", "against_dictionaries": ["d"], "codebook": "e", "explainer_model": "f"}
    others = ("against", "against_dictionaries", "codebook", "explainer", "explainer_model")
    for name in ("workdir", "dictionaries", "step", "split", "examples", "element", "out", "data_dir", *others):
        monkeypatch.setattr(program, f"_{name.upper()}", type("Flag", (), {"value": flags.get(name)}))
    program.main()
    rest = (Path("c"), [Path("d")], Path("e"), "predicates", "f")
    assert asked == [(run, [Path("a"), Path("b")], "test", None, 3, 2, None, None, *rest)]
    assert capsys.readouterr().out == "wrote a.html, a.json and a.jsonl\n"
    monkeypatch.setattr(program, "_WORKDIR", type("Flag", (), {"value": None}))
    with pytest.raises(UserError, match="--workdir=DIR is missing"):
        program.main()
