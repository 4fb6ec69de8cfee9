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
from experiments.evaluation import agreement, splicing
from experiments.explaining import against, measure, writer
from experiments.explaining import codes as code_table
from experiments.explaining import page as pages
from experiments.explaining.dictionaries import read
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
def codes(run, tiny, tmp_path_factory) -> Path:
    """The run's parameters, with random codes at m."""
    experiment = build({**tiny(VALUES), "codebook": {**base.codebook().to_dict(), "codes": 30}})
    variables = random_like(jax.eval_shape(lambda: experiment.functions.variables(0)))
    plain = load(run).variables
    variables["params"]["target"] = plain["params"]
    variables["batch_stats"] = {"target": plain["batch_stats"]}
    return write(tmp_path_factory.mktemp("codes") / "codes", experiment, variables, 5)


@pytest.fixture(scope="module")
def explained(run, given, codes, tmp_path_factory):
    """The page, its numbers, and what was measured for it."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splicing, "losses", lambda *_: LOSSES)
        original = measure.explain
        patch.setattr(measure, "explain", lambda *a: found.append(original(*a)) or found[-1])
        out = tmp_path_factory.mktemp("page") / "why.html"
        path, numbers = writer.write_explanation(run, [given], examples=10, out=out, codebook=codes)
    return path, json.loads(numbers.read_text()), found[0]


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


def test_codebooks_of_another_model_are_refused(run, codes):
    with pytest.raises(UserError, match=r"^--codebook: .*run has no codebooks at m"):
        code_table.read(load(run), run)
    other = dataclasses.replace(load(run), values={**load(run).values, "task": {"name": "mqar"}})
    with pytest.raises(UserError, match=r"^--codebook: .* is not of a model as in .*: config\.task"):
        code_table.read(other, codes)
    with pytest.raises(
        UserError, match=r"codes has codebooks at m: explain the run that it began from, with --codebook="
    ):
        read(bound(load(codes)), [run])


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


def test_the_page(explained):
    path, why, _ = explained
    source = path.read_text()
    reader = checked(source)
    tables = 3 + sum(bool(layer["shown"]) for layer in why["codes"]["layers"])
    assert source.count('<div class="wide"><table>') == source.count("<table") == tables, "tables scroll on a phone"
    text = " ".join("".join(reader.text).split())
    (layer,) = why["layers"]
    for title in ("Features", "One decision taken apart twice", "Health of the dictionaries"):
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
def written(explained, run, monkeypatch):
    """written(explained) is the text of a page of what was measured, changed."""
    monkeypatch.setattr(pictures, "_uri", lambda figure: pictures.plt.close(figure) or BLANK)
    task = lambda vocabulary: type(
        "Task",
        (),
        {"config": type("C", (), {"vocabulary_size": vocabulary}), "symbol": lambda self, number: HOSTILE + CONTROL},
    )()
    _, why, found = explained

    def text(layer=found, vocabulary=9, other=None, **changes) -> str:
        loaded = writer.load(run)
        shown = dataclasses.replace(loaded)
        vars(shown)["experiment"] = type("E", (), {"task": task(vocabulary)})
        return pages.page({**why, **changes}, [layer], shown, [(np.ones(40, int), len(found.decision.sources))], other)

    return text


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


def test_a_mixer_without_a_kernel_has_no_sum_over_sources(run, given, monkeypatch):
    from experiments.explaining.decisions import take_apart
    from seqboat.layers.mixer import MixerConfig

    loaded = writer.load(run)
    (dictionary,) = read(loaded, [given])
    config = loaded.model.config.encoder.layer
    monkeypatch.setattr(type(config.mixer), "kernel", MixerConfig.kernel)
    zeros = np.zeros((1, 12, config.features), np.float32)
    look = measure.Look(zeros, zeros[..., 0], None, {"ssm_out": zeros[0], "pre_norm": zeros[0]}, None)
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


def test_units_and_routes_of_a_run_are_those_of_its_twin(run, twin, given, dictionary, tmp_path, written):
    experiment, variables = dictionary
    values = {**experiment.values, "task": {**experiment.values["task"], "run": str(twin)}}
    own = write(tmp_path / "m2", build(values), variables, 6)
    loaded = writer.load(run)
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
    path, numbers = writer.write_explanation(run, [], examples=10, out=tmp_path / "why.html", against=twin)
    why = json.loads(numbers.read_text())
    assert why["layers"] == []
    assert why["against"]["workdir"] == str(twin)
    assert [layer["routing"]["same"] for layer in why["against"]["layers"]] == [1, 1]
    text = "".join(checked(path.read_text()).text)
    assert "No dictionary of layer 2 was given, so nothing is said about it." in text
    assert "Health of the dictionaries" not in text


def test_sequences_are_compared_up_to_their_ends(run, twin, monkeypatch):
    """Few enough examples, and nothing of the padding."""
    monkeypatch.setattr(against, "ELEMENTS", 100)
    loaded = writer.load(run)
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


def refused(message: str, run: Path, *paths: Path, **options) -> None:
    with pytest.raises(UserError, match=message) as found:
        writer.write_explanation(run, paths, **options)
    assert "\n" not in str(found.value)
    assert not (run / "why.html").exists()


def test_what_does_not_belong_together_is_refused(run, given, dictionary, tmp_path):
    refused("--dictionaries=DIR,DIR is missing", run)
    refused("--against=DIR is missing", run, given, against_paths=[given])
    again = Path(shutil.copytree(given, tmp_path / "again"))
    refused(f"{given} and {again} are both of layer 2", run, given, again)
    refused(f"{run} holds a Classifier, not a dictionary of m", run, run)
    experiment, variables = dictionary
    task = {**experiment.values["task"], "site": "gated"}
    gated = write(
        tmp_path / "g", dataclasses.replace(experiment, values={**experiment.values, "task": task}), variables, 6
    )
    refused("is of gated: a router's margin is a sum over features of m", run, gated)
    refused("no evaluation split 'tset'", run, given, split="tset")


def test_another_runs_dictionary_is_refused(run, given, tiny, untrained, tmp_path):
    other = untrained(tiny({**VALUES, "seed": 3}), tmp_path / "o", step=4)
    refused(f"is of step 4 of {run}, not of step 4 of the run in {other}", other, given)
    never = untrained(tiny({**VALUES, "model.activation": "never"}), tmp_path / "never")
    refused("the layers of this model have no router", never, given)
    refused(f"the run in {never}: the layers of this model have no router", run, against=never)


def test_what_cannot_be_compared_is_refused(run, twin, given, tiny, untrained, tmp_path):
    loaded = writer.load(run)

    def refused(message: str, path: Path, *dictionaries: Path) -> None:
        with pytest.raises(UserError, match=message) as found:
            against.read_other(loaded, path, dictionaries)
        assert "\n" not in str(found.value)

    again = Path(shutil.copytree(run, tmp_path / "again"))
    refused(f"--against={run} is the run itself", run)
    refused(f"--against={again} is the run itself", again)
    refused(f"there is no work directory {tmp_path / 'none'}", tmp_path / "none")
    refused(f"--against_dictionaries: {given} is of step 4 of {run}", twin, given)
    refused(f"--against={given} is of the task activations, and {run} of short_listops", given)
    small = untrained(tiny({**VALUES, "model.layers": 1}), tmp_path / "small")
    refused(f"--against={small} has 1 layers, and {run} has 2", small)
    longer = untrained(tiny({**VALUES, "task.tokens": "40-128"}), tmp_path / "longer")
    refused(f"--against={longer} is of another task than {run}: config.task.tokens: '8-40' -> '40-128'", longer)
    for path in again.rglob("state/d/*"):
        path.write_bytes(b"")
    refused("damaged|differs|truncated", again)


def test_the_program_hands_its_flags_on(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(program, "write_explanation", lambda *a: asked.append(a) or ("a.html", "a.json"))
    flags = {"workdir": str(run), "dictionaries": ["a", "b"], "examples": 3, "element": 2}
    flags |= {"against": "c", "against_dictionaries": ["d"], "codebook": "e"}
    others = ("against", "against_dictionaries", "codebook")
    for name in ("workdir", "dictionaries", "step", "split", "examples", "element", "out", "data_dir", *others):
        monkeypatch.setattr(program, f"_{name.upper()}", type("Flag", (), {"value": flags.get(name)}))
    program.main()
    assert asked == [(run, [Path("a"), Path("b")], "test", None, 3, 2, None, None, Path("c"), [Path("d")], Path("e"))]
    assert capsys.readouterr().out == "wrote a.html and a.json\n"
    monkeypatch.setattr(program, "_WORKDIR", type("Flag", (), {"value": None}))
    with pytest.raises(UserError, match="--workdir=DIR is missing"):
        program.main()
