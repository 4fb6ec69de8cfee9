"""The training loop: what it writes and when, and how it stops."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from experiments.common import provenance
from experiments.common.errors import UserError
from experiments.training import loop
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import build
from experiments.training.loop import Finished, train
from experiments.training.metrics import METRICS_FILE
from tests.helpers import grid


def records(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]


def steps_of(workdir: Path, kind: str) -> list[int]:
    return [record["step"] for record in records(workdir) if record["kind"] == kind]


def saved(workdir: Path) -> list[int]:
    return Checkpoints(workdir / "checkpoints", read_only=True).steps()


def state_of(experiment, workdir: Path, step: int) -> Any:
    abstract = jax.eval_shape(lambda: experiment.functions.init(experiment.config.seed))
    return Checkpoints(workdir / "checkpoints", read_only=True).restore(step, abstract).state


# What is written, and when


def test_a_run(light, tmp_path, capsys):
    """6 steps: reported at 3 and 6 (and at the first), evaluated at 4 and 6, saved at 2, 4 and 6."""
    experiment = light()
    train(experiment, tmp_path / "run")
    output = capsys.readouterr().out
    assert output.splitlines()[0] == experiment.describe()
    assert f"parameters on one device of {jax.device_count()}; --config.mesh=data uses all of them (cpu)" in output
    assert "done: step 6, best step" in output

    assert steps_of(tmp_path / "run", "train") == [1, 3, 6]
    assert steps_of(tmp_path / "run", "evaluation") == [4, 6]
    assert saved(tmp_path / "run") == [2, 4, 6]
    written = {"loss", "accuracy", "activation_rate", "confidence", "temperature", "elements"}
    for record in records(tmp_path / "run"):
        assert written <= set(record)
        if record["kind"] == "train":
            assert {"gradient_norm", "seconds", "elements_per_second"} <= set(record)
        else:
            assert record["split"] == "validation"
        assert np.isfinite(record["loss"])
        assert len(record["activation_rate"]) == 2

    meta = Checkpoints(tmp_path / "run/checkpoints", read_only=True).read_meta()
    assert meta["config"] == json.loads(json.dumps(experiment.values))
    assert set(meta["versions"]) == {"seqboat", "python", *provenance.VERSIONED}
    assert "cpu" in meta["hardware"]


def test_reported_means_are_of_the_steps_since_the_last_report(light, initial, tmp_path):
    """Of a model that does not move: the mean loss of batches 1 and 2, and not of batch 0, is reported at step 3."""
    experiment = light({"optimizer.learning_rate_scales": ((".", 0.0),)})
    train(experiment, tmp_path)
    state = initial(experiment)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    evaluate = jax.jit(experiment.functions.evaluate)
    losses = [float(evaluate(variables, experiment.task.train_batch(n))["loss"][0]) / 8 for n in range(6)]
    expected = [losses[0], np.mean(losses[1:3]), np.mean(losses[3:6])]
    reported = [record["loss"] for record in records(tmp_path) if record["kind"] == "train"]
    assert reported == pytest.approx(expected, rel=1e-5)


def test_every_knob_of_the_loop(light, tmp_path):
    settings = {
        "train.steps": 5,
        "train.log_every": 4,
        "train.evaluate_every": 2,
        "train.checkpoint_every": 1,
        "train.keep_checkpoints": 1,
        "train.trackers": ("tensorboard",),
    }
    train(light(settings), tmp_path)
    assert steps_of(tmp_path, "train") == [1, 4, 5]
    assert steps_of(tmp_path, "evaluation") == [2, 4, 5]
    accuracy = {r["step"]: r["accuracy"] for r in records(tmp_path) if r["kind"] == "evaluation"}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert saved(tmp_path) == sorted({best, 5})
    assert list((tmp_path / "tensorboard").iterdir())

    train(light({"train.steps": 1}), tmp_path / "plain")
    assert not (tmp_path / "plain/tensorboard").exists()


def test_the_best_checkpoint_is_kept(light, tmp_path):
    """The model is best at the start: its learning rate ruins it, while a frozen one stays as good as it was."""
    settings = {"train.steps": 8, "train.keep_checkpoints": 1, "train.evaluate_every": 2}
    train(light({**settings, "optimizer.learning_rate_scales": ((".", 0.0),)}), tmp_path)
    assert saved(tmp_path) == [2, 8]  # of equal ones the first


def test_nothing_to_train(light, tmp_path, capsys):
    train(light({"train.steps": 0}), tmp_path)
    assert saved(tmp_path) == [0]
    assert records_or_none(tmp_path) == []
    train(light(), tmp_path / "run")
    before = (tmp_path / "run" / METRICS_FILE).read_bytes()
    capsys.readouterr()
    train(light(), tmp_path / "run")
    assert "step 6 of 6: nothing left to train" in capsys.readouterr().out
    assert (tmp_path / "run" / METRICS_FILE).read_bytes() == before
    train(light({"train.steps": 4}), tmp_path / "run")
    assert "step 6 of 4: nothing left to train" in capsys.readouterr().out
    assert saved(tmp_path / "run") == [2, 4, 6]


def records_or_none(workdir: Path) -> list[dict[str, Any]]:
    return records(workdir) if (workdir / METRICS_FILE).exists() else []


def test_mistakes_are_found_before_anything_is_written(light, tmp_path):
    experiment = light({"optimizer.weight_decays": (("decoder", 0.0),)})
    with pytest.raises(UserError, match=r"^config\.optimizer\.weight_decays: 'decoder' matches no parameter; there"):
        train(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file(light, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^checkpoints=.*file/checkpoints: Not a directory"):
        train(light(), tmp_path / "file")


# Resuming


def test_resuming_with_another_config_says_what_changed(light, tmp_path, capsys):
    rules = {"optimizer.weight_decays": (("table", 0.0),)}
    train(light(rules), tmp_path)
    capsys.readouterr()
    train(light({**rules, "train.steps": 8, "train.log_every": 4}), tmp_path)
    output = capsys.readouterr().out
    assert "resuming from step 6 of" in output
    changed = [line.split(": ", 1)[1] for line in output.splitlines() if line.startswith("changed since")]
    assert changed == ["config.train.log_every: 3 -> 4", "config.train.steps: 6 -> 8"]
    assert steps_of(tmp_path, "train") == [1, 3, 6, 8]
    assert steps_of(tmp_path, "evaluation") == [4, 6, 8]
    assert saved(tmp_path)[-1] == 8


@pytest.mark.breadth  # test_checkpoints.py: test_other_shapes; test_init_from_another_model_makes_no_work_directory
def test_another_width_is_refused(light, tiny, tmp_path):
    train(light({"train.steps": 1}), tmp_path)
    with pytest.raises(UserError, match=r"step 1 in .* does not fit this model: .* use the config it was made with"):
        train(build(tiny()), tmp_path)
    assert saved(tmp_path) == [1]


def test_init_from_another_run(light, initial, tmp_path):
    settings = {"train.steps": 2, "train.evaluate_every": 2}
    train(light(settings), tmp_path / "first")
    frozen = light({**settings, "seed": 1, "optimizer.learning_rate_scales": ((".", 0.0),)})
    train(frozen, tmp_path / "second", init_from=tmp_path / "first")
    first, second = (state_of(frozen, tmp_path / name, 2) for name in ("first", "second"))
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
    assert int(second.opt_state.count) == 2  # of its own two steps
    assert not np.array_equal(initial(frozen).params["table"], second.params["table"])


@pytest.mark.breadth  # test_init_from_another_run; test_resume.py
def test_init_from_is_only_for_the_start(light, tmp_path):
    """A run that was stopped resumes from its own checkpoint, with the same command."""
    train(light({"train.steps": 2}), tmp_path / "other")
    train(light({"train.steps": 4}), tmp_path / "run", init_from=tmp_path / "other")
    before = state_of(light(), tmp_path / "run", 4).params["table"]
    again = light({"train.steps": 6, "optimizer.learning_rate_scales": ((".", 0.0),)})
    train(again, tmp_path / "run", init_from=tmp_path / "other")
    np.testing.assert_array_equal(state_of(again, tmp_path / "run", 6).params["table"], before)


EVERY_TWO = {"train.evaluate_every": 2, "train.checkpoint_every": 2}


@pytest.fixture
def first(light, built_light, tmp_path) -> Path:
    """A run whose parameters have all moved."""
    built_light()
    train(light({**EVERY_TWO, "train.steps": 2, "train.activation_penalty": 1.0}), tmp_path / "first")
    return tmp_path / "first"


def test_init_select_takes_the_named_parameters_alone(light, initial, first, tmp_path):
    """The others are the seed's."""
    frozen = light({**EVERY_TWO, "seed": 1, "train.steps": 2, "optimizer.learning_rate_scales": ((".", 0.0),)})
    train(frozen, tmp_path / "frozen", first, ["ga*"])
    first = state_of(light(), first, 2).params
    found, own = state_of(frozen, tmp_path / "frozen", 2).params, initial(frozen).params
    np.testing.assert_array_equal(found["gate"], first["gate"])
    np.testing.assert_array_equal(found["table"], own["table"])
    assert not np.array_equal(first["gate"], own["gate"])


@pytest.mark.breadth  # test_init_from_is_only_for_the_start: resuming; test_resume.py
def test_a_run_with_init_select_that_was_stopped_resumes_bit_for_bit(light, first, tmp_path):
    for directory, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            train(light({**EVERY_TWO, "seed": 1, "train.steps": steps}), tmp_path / directory, first, ["ga*"])
    whole, resumed = (state_of(light(), tmp_path / name, 4) for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.fixture(scope="module")
def sources(tiny, untrained, tmp_path_factory) -> Path:
    """A folder of what a run might start from: another model's run, that run broken, and a state dict."""
    folder = tmp_path_factory.mktemp("sources")
    untrained(tiny(), folder / "run")
    np.savez(folder / "state.npz", x=np.ones(3))
    shutil.copytree(folder / "run", folder / "broken")
    largest = max((folder / "broken").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("source", "select", "message"),
    [
        ("run", "tables/**", r"--init_select='tables/\*\*' matches no parameter; there are mean, gate, table$"),
        (
            "run",
            "table",
            r"--init_from=.*run does not fit --init_select: params/table \(.*\) float32 is missing in it$",
        ),
        ("missing", "table", r"--init_from=.*missing: there is no such work directory or file$"),
        ("state.npz", "table", r"--init_select: selects from a run or an exported file; .*state.npz is a state dict$"),
        ("broken", "table", r"^damaged checkpoints in .*broken.*; no usable checkpoint is left: "),
    ],
)
def test_init_select_of_what_does_not_fit(light, sources, tmp_path, source, select, message):
    with pytest.raises(UserError, match=message) as caught:
        train(light(), tmp_path / "new", sources / source, [select])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.breadth  # test_init_select_of_what_does_not_fit
def test_init_select_of_another_shape(tiny, untrained, tmp_path):
    """Found before anything is compiled."""
    with pytest.raises(UserError, match=r"embedding/table is \(\d+, 8\) float32 in it, \(\d+, 12\) float32 here$"):
        train(
            build(tiny({"model.features": 12})), tmp_path / "new", untrained(tiny(), tmp_path / "run"), ["embedding/*"]
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "--init_from=.*missing: there is no such work directory or file"),
        ("gs://bucket/run", "--init_from=gs://bucket/run: expected a path"),
        ("~nosuchuser", "--init_from=~nosuchuser: that user's home directory is unknown"),
        ("empty", "there is no checkpoint directory .*empty/checkpoints"),
        ("state.npz", "--init_from=.*state.npz: published state dicts are of classifiers, this model is a Light"),
    ],
)
def test_init_from_what_is_not_a_run(light, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "state.npz", x=np.ones(3))
    with pytest.raises(UserError, match=message):
        train(light(), tmp_path / "run", init_from=name if name[0] in "g~" else tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_init_from_another_model_makes_no_work_directory(light, sources, tmp_path):
    with pytest.raises(UserError, match="does not fit this model"):
        train(light(), tmp_path / "run", init_from=sources / "run")
    assert not (tmp_path / "run").exists()


def test_a_first_save_that_was_killed_is_not_a_start(light, tmp_path):
    """Its remains do not make --init_from forgotten."""
    (tmp_path / "run/checkpoints/2.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="no such work directory or file"):
        train(light(), tmp_path / "run", init_from=tmp_path / "missing")


@pytest.mark.parametrize("lost", grid(("all", "the end", "the beginning"), "the end"))
def test_metrics_that_are_lost_are_missed(light, tmp_path, lost, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    train(light(), tmp_path)
    train(light({"train.steps": 7}), tmp_path)
    assert lines == []
    path = tmp_path / METRICS_FILE
    records = path.read_text().splitlines(keepends=True)
    path.write_text("".join({"all": [], "the end": records[:1], "the beginning": records[1:]}[lost]))
    train(light({"train.steps": 8}), tmp_path)
    assert lines == [f"{path} lacks records of the steps up to 6; continuing without them"]
    assert steps_of(tmp_path, "train")[-1] == 8


def test_a_metrics_file_that_is_a_directory(light, tmp_path):
    (tmp_path / METRICS_FILE).mkdir(parents=True)
    with pytest.raises(UserError, match=r"could not rewrite .*metrics.jsonl: Is a directory"):
        train(light(), tmp_path)


@pytest.mark.breadth  # test_a_run: a work directory; test_restore.py: test_paths_are_read_as_everywhere
def test_a_work_directory_with_brackets(light, tmp_path):
    train(light({"train.steps": 1}), tmp_path / "[a]/x[1]")
    train(light({"train.steps": 2}), tmp_path / "[a]/x[1]")
    assert steps_of(tmp_path / "[a]/x[1]", "train") == [1, 2]
    assert saved(tmp_path / "[a]/x[1]") == [1, 2]
    train(light({"train.steps": 1}), tmp_path / "next", init_from=tmp_path / "[a]/x[1]")


def test_a_second_run_disturbs_nothing(light, tmp_path):
    train(light({"train.steps": 2}), tmp_path)
    before = (tmp_path / METRICS_FILE).read_bytes()
    with Checkpoints(tmp_path / "checkpoints"), pytest.raises(UserError, match="in use by process"):
        train(light({"train.steps": 4}), tmp_path)
    assert (tmp_path / METRICS_FILE).read_bytes() == before
    assert saved(tmp_path) == [2]


# Stopping


def test_how_it_ended(light, tmp_path, monkeypatch):
    answers: list[bool] = []
    monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self: bool(answers) and answers.pop(0))
    experiment = light({"train.steps": 4})

    def ended(*asked: bool) -> Finished:
        answers[:] = asked  # before the first step, and after each
        return train(experiment, tmp_path)

    assert ended(True) == Finished(0, stopped=True)
    assert ended(False, False, False, True) == Finished(3, stopped=True)
    assert ended(True) == Finished(3, stopped=True)
    assert saved(tmp_path) == [2, 3]
    assert ended(False, True) == Finished(4, stopped=True)  # at its last step
    assert ended() == Finished(4, stopped=False)


def poisoned_at(experiment, step: int):
    """The experiment with a loss that is not a number for the batch of that step, known by its inputs."""
    bad = jnp.asarray(experiment.task.train_batch(step)["inputs"])

    def loss(out, batch):
        total, weight, metrics = experiment.task.loss(out, batch)
        is_bad = (batch["inputs"] == bad[: batch["inputs"].shape[0]]).all()
        total = total * jnp.where(is_bad, jnp.nan, 1.0)
        return total, weight, {**metrics, "loss": (total, weight)}

    return loss


def test_not_a_number_stops_the_run_and_the_good_checkpoint_stays(light, tmp_path, capsys):
    """Batch 4 is poisoned, so the fifth update goes wrong: step 4 is good, evaluated and saved."""
    settings = {"train.steps": 40, "train.log_every": 3}
    good = light(settings)
    with pytest.raises(UserError) as caught:
        train(light(settings, loss=poisoned_at(good, 4)), tmp_path)
    message = str(caught.value)
    assert message.startswith("the loss, its gradient or the update stopped being finite at step 5: ")
    assert "the last good checkpoint is step 4; " in message
    assert message.endswith("a lower config.optimizer.learning_rate or clip_norm may help")
    assert "\n" not in message
    assert steps_of(tmp_path, "train") == [1, 3]
    assert saved(tmp_path) == [2, 4]
    state = state_of(good, tmp_path, 4)
    assert int(state.bad_step) == -1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # A loss without the defect resumes from there.
    capsys.readouterr()
    train(light({**settings, "train.steps": 6}), tmp_path)
    assert "resuming from step 4" in capsys.readouterr().out
    assert saved(tmp_path)[-1] == 6


@pytest.mark.breadth  # test_not_a_number_stops_the_run_and_the_good_checkpoint_stays
def test_a_loss_that_is_not_a_number_at_the_very_first_step_is_said_to_be_the_loss(light, tmp_path):
    """Every gradient is not a number then, and naming one would lead astray."""
    with pytest.raises(UserError, match=r"finite at step 1: .*; there is no checkpoint yet; a lower") as caught:
        train(light(loss=poisoned_at(light(), 0)), tmp_path)
    assert "the values of all layers are finite; the loss is not" in str(caught.value)
    assert saved(tmp_path) == []


@pytest.fixture(scope="module")
def spoilt(seqboat, random_state) -> Callable[..., Any]:
    """The state before the first step of a SeqBoat with one parameter of one layer that is not finite."""
    state = jax.tree.map(jnp.asarray, random_state(seqboat))

    def spoil(value: float, layer: int, *path: str) -> Any:
        leaf = state.params["encoder"]["layers"]
        for name in path:
            leaf = leaf[name]
        changed = leaf.at[layer].set(value)
        return state.replace(params=jax.tree_util.tree_map(lambda a: changed if a is leaf else a, state.params))

    return spoil


@pytest.mark.breadth  # test_a_loss_that_is_not_a_number_at_the_very_first_step_is_said_to_be_the_loss
def test_the_first_value_that_is_not_finite_is_named(seqboat, spoilt, monkeypatch):
    """By one program for all: the parameters are its argument."""
    programs: list[Any] = []
    compile = jax.jit
    monkeypatch.setattr(jax, "jit", lambda function: programs.append(compile(function)) or programs[0])
    for layer, path, where in (
        (1, ("sparse", "configurator", "logits", "kernel"), "router_logits"),
        (0, ("sparse", "configurator", "log_temperature"), "confidence"),
        (1, ("gau", "position_bias"), "attended"),
    ):
        state = spoilt(jnp.nan, layer, *path).replace(bad_step=jnp.int32(0))
        assert loop.locate(seqboat, state) == f"first in layer {layer}, in {where}"


@pytest.mark.breadth
def test_a_run_of_seqboat_names_the_step_the_layer_and_the_value(seqboat, spoilt, tmp_path):
    """Layer 1's SSM is poisoned in the checkpoint that the run starts from."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, spoilt(jnp.inf, 1, "ssm", "omega"), {"config": seqboat.values})
    with pytest.raises(UserError) as caught:
        train(seqboat, tmp_path)
    assert str(caught.value) == (
        "the loss, its gradient or the update stopped being finite at step 1: first in layer 1, in ssm_out; the last "
        "good checkpoint is step 0; a lower config.optimizer.learning_rate or clip_norm may help"
    )
