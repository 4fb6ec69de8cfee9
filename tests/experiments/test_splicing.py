"""What splicing costs: three losses, of a dictionary that is exact, and of the mean; and how an evaluation says it."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import random_like

from experiments.common.errors import UserError
from experiments.data import identity
from experiments.evaluation import evaluator, splicing
from experiments.evaluation.examples import Scores
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import build
from experiments.training.restore import Run, load
from experiments.training.step import means
from seqboat.interp.edits import Replace, Splice, Transcode
from seqboat.layers import taps
from tests.experiments.test_activations import values as dictionary_of
from tests.interp.test_edits import same


@pytest.fixture(scope="module")
def run(tiny):
    values = tiny({"task.test_examples": 8})
    experiment = build(values)
    return Run(values, experiment.model, random_like(jax.eval_shape(lambda: experiment.functions.variables(0))), 0)


@pytest.mark.parametrize(
    ("site", "layer", "message"),
    [
        ("gating", 1, "gating of layer 1: edits: there is no site 'gating' in this model; it has"),
        ("gated", 3, "gated of layer 3: layer=3: layers are numbered from 1 to 2"),
        ("m", 1, "m of layer 1: Splice: a dictionary from 16 to 16 channels at a value of 8"),
    ],
)
def test_a_dictionary_of_another_site_is_refused(run, site, layer, message):
    with pytest.raises(UserError, match=message) as found:
        splicing.losses(run, "test", site, layer, same(16))
    assert "\n" not in str(found.value)


@pytest.mark.breadth  # test_edits.py: what splices and replacements do; here four programs are compiled
def test_three_losses_of_a_split(run):
    found = splicing.losses(run, "test", "gated", 2, same(16))
    assert found["spliced"] == pytest.approx(found["plain"], rel=1e-5)
    assert abs(found["ablated"] - found["plain"]) > 1e-4 * found["plain"]

    (batch,) = run.task.evaluation_batches("test")
    examine = jax.jit(lambda v, b: run.experiment.functions.evaluate_examples(v, b, tapped=True))
    examined = examine(run.variables, batch)
    assert found["plain"] == pytest.approx(means(examined.total)["loss"], rel=1e-5)
    value = np.asarray(taps.read(examined.taps, "gated"))[1]
    active = np.asarray(taps.read(examined.taps, "active"))[1, ..., 0]
    assert 0 < active.sum() < batch["lengths"].sum()
    np.testing.assert_allclose(splicing.mean(run, "test", "gated", 2), value[active].mean(0), rtol=1e-4, atol=1e-6)


# An evaluation with --splice.


@pytest.fixture(scope="module")
def source(tiny, untrained, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("splice") / "run"
    untrained(tiny(), workdir, step=3, accuracy=0.1)
    return untrained(tiny(), workdir, step=4, accuracy=0.2)


def dictionary_in(workdir: Path, source: Path, **changes) -> Path:
    """A dictionary of m of layer 2 of the source's best step, with random parameters."""
    experiment = build(dictionary_of(source, task__layer=2, **changes))
    variables = random_like(jax.eval_shape(lambda: experiment.functions.variables(0)))
    meta = {"config": experiment.values, "versions": {"jax": "1"}, "data": identity.remember(experiment.task)}
    with Checkpoints(workdir / "checkpoints", keep=1, best_metric="nmse", higher_is_better=False) as checkpoints:
        checkpoints.save(6, variables, meta, None)
    return workdir


@pytest.fixture(scope="module")
def made(source) -> Path:
    return dictionary_in(source.parent / "m2", source)


@pytest.mark.breadth  # test_a_transcoder_is_spliced_where_the_network_writes: into what; test_evaluation.py: a report
def test_an_evaluation_says_what_a_splice_costs(source, made, monkeypatch, capsys):
    """Scores are made up: 0 as it is, 1 with a splice, 2 with the mean."""
    applied = []

    def score(run, split, streams=None):
        edits = run.variables.get("edits")
        edit = edits and edits["encoder"]["layers"]["m"]
        applied.append(edit)
        loss = {type(None): 0.0, Splice: 1.0, Replace: 2.0}[type(edit)]
        numbers = np.array([loss, loss + 0.5]), np.ones(2)
        examples = {"loss": numbers, "accuracy": numbers}
        total = {name: (pair[0].sum(), pair[1].sum()) for name, pair in examples.items()}
        return Scores(total, examples, (b"a", b"b"), {"examples_per_second": None})

    monkeypatch.setattr(evaluator, "score", score)
    monkeypatch.setattr(splicing, "mean", lambda *_: np.zeros(8))
    result = evaluator.measure_run(source, splice=made)
    found = result["splice"]
    assert {how: each["loss"] for how, each in found["metrics"].items()} == {
        "plain": 0.25,
        "spliced": 1.25,
        "ablated": 2.25,
    }
    assert found["metrics"]["spliced"]["accuracy"] == result["accuracy"] == 1.25
    assert (found["site"], found["layer"], found["step"]) == ("m", 2, 6)
    assert result["against"]["workdir"] == str(source)
    assert result["against"]["metrics"]["loss"]["difference"] == 1
    assert result["against"]["differences"] == ["splice: m of layer 2 -> none"]
    assert [None if edit is None else edit.where.tolist() for edit in applied] == [[False, True], None, [False, True]]
    assert evaluator.result_file(result) == "splice_test_4_m2.json", "not an evaluation of the run itself"
    evaluator.show(result)
    printed = capsys.readouterr().out
    assert "m of layer 2" in printed
    assert "this run is worse in loss" in printed
    applied.clear()
    evaluator.measure_run(source, splice=made, against=source)
    assert [type(edit) for edit in applied] == [Splice, type(None), type(None), Replace], "the other run, and this one"


def test_a_transcoder_is_spliced_where_the_network_writes(with_feed_forward, tmp_path, monkeypatch):
    made = dictionary_in(
        tmp_path / "ff2", with_feed_forward, task__target_site="feed_forward_out", model__auxiliary=0.0
    )
    run = load(with_feed_forward)
    spliced = splicing.of(run, made)
    assert (spliced.site, spliced.reads, spliced.layer) == ("feed_forward_out", "m", 2)
    assert spliced.place == "feed_forward_out of layer 2 (computed from m)"
    (edit,) = taps.written(spliced.into(run).variables["edits"]).values()
    assert (type(edit), edit.reads, edit.where.tolist()) == (Transcode, "m", [False, True])
    monkeypatch.setattr(splicing, "means", lambda total: {"loss": total})
    record = spliced.record("loss", plain=Scores(0.5, {}, (), {}))
    assert (record["reads"], record["site"], record["metrics"]) == ("m", "feed_forward_out", {"plain": {"loss": 0.5}})


@pytest.mark.breadth  # test_a_dictionary_of_another_site_is_refused; test_explain.py: refusals of the same readers
def test_what_is_not_a_dictionary_of_the_run_is_one_line(source, made, tiny, untrained, tmp_path):
    other = untrained(tiny({"train.log_every": 2}), tmp_path / "other", step=4)
    transcoder = dictionary_in(tmp_path / "transcoder", source, task__target_site="resid", model__auxiliary=0.0)
    for run, splice, options, message in (
        (
            source,
            source,
            {},
            f"--splice={source} holds a Classifier: expected a dictionary or a transcoder (configs/interp)",
        ),
        (
            source,
            transcoder,
            {},
            "resid of layer 2: edits: resid: cannot be computed from m here: no other value is at hand",
        ),
        (source, made, {"step": 3}, f"of step 4 of {source}, not of step 3 of {source}; --step=4 evaluates that one"),
        (other, made, {}, f"--splice={made} is a dictionary of step 4 of {source}, not of step 4 of {other}"),
        (source, tmp_path / "none", {}, f"there is no work directory {tmp_path / 'none'}"),
        (source, made, {"streams": 1}, "--streams: not together with --splice; remove one of them"),
        (source, made, {"parameter_dtype": "int8"}, "--parameter_dtype: not together with --splice"),
    ):
        with pytest.raises(UserError) as caught:
            evaluator.measure_run(run, splice=splice, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
