"""The activations of another run as a task: which rows, exact resume, and sources that are refused."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.interp import dictionary as recipe
from experiments.common.errors import UserError
from experiments.data import identity
from experiments.evaluation.evaluator import measure_run
from experiments.tasks.activations import Config, Task
from experiments.training import activations, restore
from experiments.training.activations import Activations
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train
from seqboat.interp.dictionaries import health
from seqboat.models.dictionary import atoms
from tests.experiments.test_resume import assert_same_run
from tests.helpers import grid

SMALL = {
    "model.size": 24,
    "model.k": 3,
    "model.auxiliary_k": 4,
    "model.dead_after": 100,
    "task.chunk": 1,
    "task.evaluation_batches": 2,
    "optimizer.warmup_steps": 1,
    "train.steps": 6,
    "train.batch_size": 160,
    "train.log_every": 3,
    "train.evaluate_every": 3,
    "train.checkpoint_every": 3,
}
BATCH, LENGTH, WIDTH = 8, 40, 8  # of the tiny SeqBoat


def values(run: Any, **changes: Any) -> dict[str, Any]:
    config = recipe.get_config()
    config.update_from_flattened_dict(SMALL)
    config.task.run = None if run is None else str(run)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config.to_dict()


@pytest.fixture(scope="module")
def source(tiny, untrained, tmp_path_factory) -> Path:
    """The work directory of a SeqBoat of two layers. Not to be changed: copy it."""
    return untrained(tiny(), tmp_path_factory.mktemp("source") / "run", step=4)


@pytest.fixture(scope="module")
def experiment(source, remembering) -> Experiment:
    return remembering(build(values(source)))


def again(experiment: Experiment, run: Path, steps: int = 6, **changes: Any) -> Experiment:
    """The experiment built anew, with its compiled programs."""
    built = build(values(run, **changes))
    config = dataclasses.replace(built.config, train=dataclasses.replace(built.config.train, steps=steps))
    return dataclasses.replace(built, config=config, functions=experiment.functions, partition=experiment.partition)


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory) -> Path:
    """The work directory of a trained dictionary. Not to be changed: copy it."""
    workdir = tmp_path_factory.mktemp("dictionary") / "run"
    train(experiment, workdir)
    return workdir


# The task alone, on a source of numbers.


class Numbers:
    """Row i of batch b is (b, i); every batch has 5 rows, or none."""

    positions, splits, fingerprint = 10, ("validation",), {"run": "1"}

    def __init__(self, count: int = 5, **fields: Any):
        self.config = Config(run="x", layer=2, rows="active", width=2, target_width=3, **fields)
        self.count, self.asked = count, []

    def rows(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((split, first, count))
        own = np.array([(b, i) for b in range(first, first + count) for i in range(self.count)], np.float32)
        return own.reshape(-1, 2), np.pad(own.reshape(-1, 2), ((0, 0), (0, 1)), constant_values=1)


def test_a_batch_is_a_function_of_seed_and_step():
    source = Numbers(chunk=4)
    task = Task(source, batch_size=8, seed=3)
    example = task.example()
    assert source.asked == [], "the shapes of a batch cost nothing"
    batches = [task.train_batch(step) for step in range(12)]
    assert source.asked == [("train", 0, 4), ("train", 4, 4), ("train", 8, 4)], "40 positions are 5 steps"
    for step, batch in enumerate(batches):
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            name: (a.shape, a.dtype) for name, a in example.items()
        }
        assert set(batch["inputs"][:, 0, 0].astype(int) // 4) == {step // 5}
        np.testing.assert_array_equal(batch["targets"][:, 0, :2], batch["inputs"][:, 0])
        assert (batch["weights"] == 1).all()
    resumed = Task(Numbers(chunk=4), batch_size=8, seed=3)
    for batch, later in zip(batches[7:], resumed.train_batches(7), strict=False):
        for name, array in batch.items():
            np.testing.assert_array_equal(later[name], array)
    assert np.any(Task(Numbers(chunk=4), batch_size=8, seed=4).train_batch(0)["inputs"] != batches[0]["inputs"])
    parts = [Task(Numbers(chunk=4), batch_size=8, seed=3, process_index=i, process_count=2) for i in (0, 1)]
    np.testing.assert_array_equal(
        np.concatenate([part.train_batch(7)["inputs"] for part in parts]), batches[7]["inputs"]
    )


def test_an_evaluation_reads_every_row_once_and_the_mean_has_the_baselines_error():
    task = Task(Numbers(evaluation_batches=2), batch_size=8, seed=0)
    batches = list(task.evaluation_batches("validation"))
    assert [batch["weights"].sum() for batch in batches] == [8, 2]
    assert batches[1]["lengths"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert not batches[1]["inputs"][2:].any()
    rows = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    assert len(np.unique(rows, axis=0)) == 10
    sums = []
    for batch in batches:
        mean = jnp.broadcast_to(rows.mean(0), (8, 1, 3))
        found = task.loss(SimpleNamespace(logits=mean, l0=jnp.full(8, 2.0), dead=jnp.full(8, 0.5)), batch)
        sums.append(found[2])
        assert (found[0], found[1]) == found[2]["nmse"]
    total = {name: np.divide(*np.sum([each[name] for each in sums], 0)) for name in sums[0]}
    assert total["nmse"] == pytest.approx(task.baseline("validation")["nmse"], rel=1e-6)
    assert total["loss"] == pytest.approx(np.square(rows - rows.mean(0)).sum(1).mean(), rel=1e-6)
    assert (total["l0"], total["dead"]) == (2, 0.5)
    for ask in (task.baseline, lambda split: next(task.evaluation_batches(split))):
        with pytest.raises(UserError, match="no evaluation split 'test'; this task has: validation"):
            ask("test")


def test_a_layer_without_active_elements_has_no_rows():
    with pytest.raises(UserError, match=r"config.task.rows='active': no element of layer 2 of x is active; take rows="):
        Task(Numbers(count=0), batch_size=8, seed=0).train_batch(0)


# The activations of a run.


@pytest.fixture(scope="module")
def tapped(with_feed_forward) -> tuple[Any, list, list]:
    """A run with feed-forward networks in which some elements are active, batches 1 and 2, and their taps."""
    run = restore.load(with_feed_forward)
    logits = run.variables["params"]["encoder"]["layers"]["sparse"]["configurator"]["logits"]
    logits |= {"kernel": 20 * logits["kernel"], "bias": 0 * logits["bias"]}
    batches = [run.task.train_batch(step) for step in (1, 2)]
    look = jax.jit(lambda batch: run.model.apply(run.variables, batch["inputs"], batch["lengths"], mutable=["taps"]))
    return run, batches, [jax.device_get(look(batch))[1]["taps"]["encoder"]["layers"] for batch in batches]


def test_rows_are_the_taps_of_the_run(tapped, monkeypatch):
    run, batches, taps = tapped
    monkeypatch.setattr(activations, "load", lambda *_: run)
    read = {
        site: Activations(Config(run="runs/x", layer=2, site=site, target_site=target))
        for site, target in (("m", "resid"), ("gated", None))
    }
    assert [read[site].config.rows for site in read] == ["all", "active"]
    assert [(read[site].config.width, read[site].config.target_width) for site in read] == [(8, 8), (16, None)]
    assert read["m"].positions == BATCH * LENGTH
    expected: dict[str, list] = {"m": [], "resid": [], "gated": []}
    for batch, layers in zip(batches, taps, strict=True):
        valid = np.arange(LENGTH) < batch["lengths"][:, None]
        active = layers["sparse"]["active"][1, ..., 0]
        assert 0 < active.sum() < valid.sum() < valid.size
        expected["m"].append(layers["m"][1][valid])
        expected["resid"].append(layers["resid"][1][valid])
        expected["gated"].append(layers["sparse"]["gated"][1][active])
    for site, names in (("m", ("m", "resid")), ("gated", ("gated", "gated"))):
        for found, name in zip(read[site].rows("train", 1, 2), names, strict=True):
            np.testing.assert_allclose(found, np.concatenate(expected[name]), rtol=1e-5, atol=1e-6)
    # The held-out split has 40 examples: five batches, of which the first is read here.
    held_out, _ = read["m"].rows("validation", 0, 1)
    assert len(held_out) == next(run.task.evaluation_batches("validation"))["lengths"].sum()
    assert len(read["m"].rows("validation", 4, 9)[0]) < len(read["m"].rows("validation", 0, 9)[0]) / 3


@pytest.mark.parametrize("site", grid(["m", "gated", "feed_forward_hidden"], "m"))
def test_a_transcoders_rows_are_those_where_both_sites_have_a_value(tapped, monkeypatch, site):
    run, _, (layers, _) = tapped
    monkeypatch.setattr(activations, "load", lambda *_: run)
    read = Activations(Config(run="runs/x", site=site, target_site="feed_forward_out", layer=2))
    assert (read.config.rows, read.config.target_width) == ("active", WIDTH)
    attention, network = np.moveaxis(layers["sparse"]["active"][1], -1, 0)
    there = attention & network if site == "gated" else network
    assert 0 < (attention & network).sum() < network.sum() < network.size
    values = {**layers, **layers["sparse"]}
    for found, name in zip(read.rows("train", 1, 1), (site, "feed_forward_out"), strict=True):
        np.testing.assert_allclose(found, values[name][1][there], rtol=1e-5, atol=1e-6)


def test_a_config_is_completed_by_the_run(source, experiment):
    task = experiment.values["task"]
    assert (task["step"], task["width"], task["target_width"], task["rows"]) == (4, WIDTH, None, "all")
    (place,) = experiment.task.fingerprint.values()
    assert place == f"m of layer 1, all rows, step 4, seal {restore.seal(source, 4)}"
    assert experiment.describe() == "activations: a Dictionary"


@pytest.mark.breadth  # test_resume.py: any run; test_rows_are_the_taps_of_the_run: its task
def test_a_resumed_dictionary_is_the_unbroken_one(experiment, source, finished, tmp_path):
    assert train(again(experiment, source, steps=3), tmp_path / "run").step == 3
    assert train(again(experiment, source), tmp_path / "run").step == 6
    assert_same_run(tmp_path / "run", finished, experiment)


@pytest.mark.breadth  # test_splicing.py reads one
def test_a_dictionary_is_evaluated_as_any_run_and_its_arrays_have_that_error(finished, source):
    result = measure_run(finished, "validation")
    assert result["baseline"] == {"nmse": 1.0}
    run = restore.load(finished)
    rows, _ = Activations(Config(run=str(source))).rows("validation", 0, 2)
    found = jax.jit(health)(atoms(run.variables, run.model.config), jnp.asarray(rows))
    assert result["nmse"] == pytest.approx(float(found.nmse), rel=1e-4)
    assert result["l0"] == pytest.approx(float(found.l0), rel=1e-6)
    assert result["examples"] == len(rows)
    assert 0 < result["nmse"] < 1
    assert result["standard_errors"]["nmse"] > 0


@pytest.mark.breadth  # test_carry.py: test_resuming_on_other_data_says_so; test_a_config_is_completed_by_the_run
def test_another_source_is_refused_and_a_dictionary_needs_none_to_be_read(
    tiny, untrained, experiment, source, finished, tmp_path
):
    workdir, moved = tmp_path / "dictionary", tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.copytree(source, moved)
    assert train(again(experiment, moved), workdir).step == 6, "the same run in another place"
    with pytest.raises(UserError, match=r"^config.task.run: m of layer 1, all rows, step 4, .* -> m of layer 2, all"):
        train(again(experiment, moved, task__layer=2), workdir)
    untrained(tiny(), moved, step=5, accuracy=0.5)
    with pytest.raises(
        UserError, match=r"step 4, seal \w{12} -> .* step 5, seal \w{12}: resume with what this run beg"
    ):
        train(again(experiment, moved), workdir)
    assert train(again(experiment, moved, task__step=4), workdir).step == 6
    untrained(tiny({"train.log_every": 2}), tmp_path / "changed", step=4)
    with pytest.raises(UserError, match=r"step 4, seal \w{12} -> .* step 4, seal \w{12}: resume with"):
        train(again(experiment, tmp_path / "changed"), workdir)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=rf"^config.task.run='{moved}': there is no work directory {moved}"):
        build(values(moved))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        saved = checkpoints.read_meta()
    assert saved["config"]["task"]["run"] == str(source)
    assert saved["data"]["fingerprint"] == experiment.task.fingerprint
    model, _ = restore.build_network({**saved["config"], "task": {**saved["config"]["task"], "run": str(moved)}})
    assert model.config.width == WIDTH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.step": 7}, "config.task.run='{source}': there is no checkpoint of step 7 in "),
        pytest.param({"task.layer": 3}, "config.task.layer=3: {source} has the layers 1..2", marks=pytest.mark.breadth),
        ({"task.layer": 0}, "config.task.layer=0: must be at least 1"),
        (
            {"task.site": "n"},
            "config.task.site='n': {source} has the sites attended, gate, gated, gau_out, k, m, pre_norm",
        ),
        pytest.param(
            {"task.target_site": "n"},
            "config.task.target_site='n': {source} has the sites attended",
            marks=pytest.mark.breadth,
        ),
        (
            {"task.target_site": "feed_forward_out"},
            "config.task.target_site='feed_forward_out': {source} has the sites",
        ),
        (
            {"task.target_site": "m"},
            "config.task.target_site='m': is the site itself; leave it out to reconstruct that",
        ),
        ({"task.target_site": "resid"}, "config.model.auxiliary=0.03125: must be 0 with a target_site"),
        ({"task.rows": "some"}, "config.task.rows='some': must be one of all, active"),
        ({"model.k": 0}, "config.model.k=0: must be in 1..24, the size"),
        pytest.param({"model.k": 25}, "config.model.k=25: must be in 1..24, the size", marks=pytest.mark.breadth),
        ({"mesh": "data"}, "config.mesh='data': a Dictionary takes one device"),
    ],
)
def test_a_mistake_is_one_line(source, changes, message):
    with pytest.raises(UserError) as caught:
        build(values(source, **{name.replace(".", "__"): value for name, value in changes.items()}))
    assert str(caught.value).startswith(message.format(source=source))
    assert "\n" not in str(caught.value)


def test_a_run_that_cannot_be_read_is_one_line(finished, tmp_path):
    with pytest.raises(UserError, match=r"^config.task.run=None: name the run .* --config.task.run=DIR; python -m "):
        build(values(None))
    with pytest.raises(UserError, match=rf"^config.task.run='{tmp_path}/none': there is no work directory"):
        build(values(tmp_path / "none"))
    with pytest.raises(
        UserError, match=rf"^config.task.run='{finished}' holds a Dictionary: expected a model with lay"
    ):
        build(values(finished))


def test_a_relative_run_is_found_from_another_directory(tmp_path):
    (tmp_path / "runs/x").mkdir(parents=True)
    found = identity.relocated({"task": {"run": "runs/x"}}, {"directory": str(tmp_path)}, None)
    assert found == {"task": {"run": str(tmp_path / "runs/x")}}
    gone = identity.relocated({"task": {"run": "runs/y"}}, {"directory": str(tmp_path)}, None)
    assert gone == {"task": {"run": "runs/y"}}
