"""A run that is stopped anywhere and started again is the run that was not: every array, every metric, bit for bit."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.training import loop
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE, WALL_CLOCK_FIELDS
from tests.helpers import grid

REPOSITORY = Path(__file__).parents[2]
# Everything that is drawn at random, carried from step to step or computed in parts.
MOVING_PARTS = {
    "model.dropout": 0.1,
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.norm": "batch",
    "model.router.centered": True,
    "train.accumulate": 2,
    "train.activation_penalty": 1e-3,
}
PLAN = {"train.steps": 8, "train.log_every": 3, "train.evaluate_every": 4, "train.checkpoint_every": 2}


def final(workdir: Path, experiment: Experiment) -> tuple[int, dict[str, bytes], list[dict[str, Any]]]:
    """The last step, the bytes of every array of its state, and the metrics without wall-clock fields."""
    abstract = experiment.partition.abstract(experiment.functions.init, experiment.seed)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(checkpoints.steps()[-1], abstract)
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state)
    }
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in WALL_CLOCK_FIELDS} for line in lines]
    return restored.step, arrays, metrics


def assert_same_run(workdir: Path, unbroken: Path, experiment: Experiment) -> None:
    step, arrays, metrics = final(workdir, experiment)
    expected_step, expected_arrays, expected_metrics = final(unbroken, experiment)
    assert step == expected_step
    assert [name for name in arrays if arrays[name] != expected_arrays[name]] == []
    assert metrics == expected_metrics
    assert len(arrays) > 10
    assert {line["kind"] for line in metrics} == {"train", "evaluation"}


class Stop(Exception):
    """Simulates the end of a process."""


def stopping(monkeypatch: pytest.MonkeyPatch, place: str, step: int) -> None:
    """Ends the run at a step: when it asks for the batch, after the update, or between the evaluation and the save."""
    if place == "batch":
        original = loop._Run.compile

        def compile(run, batch):
            update, start = original(run, batch), int(run.state.step)
            counter = itertools.count(start + 1)

            def stopping_update(state, batch, seed):
                if next(counter) == step:
                    raise Stop
                return update(state, batch, seed)

            return stopping_update

        monkeypatch.setattr(loop._Run, "compile", compile)
        return
    name = {"evaluation": "evaluate", "save": "save"}[place]
    method = getattr(loop._Run, name)

    def stop_at(run, at, *arguments):
        if at == step:
            raise Stop
        return method(run, at, *arguments)

    monkeypatch.setattr(loop._Run, name, stop_at)


def run_until_stopped(experiment: Experiment, workdir: Path, place: str, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, place, step)
        with pytest.raises(Stop):
            train(experiment, workdir)


# In process: an exception at every place where a run can end.


@pytest.fixture(scope="module")
def light_unbroken(light, tmp_path_factory) -> tuple[Experiment, Path]:
    experiment = light({**PLAN, "model.dropout": 0.3, "train.accumulate": 2})
    workdir = tmp_path_factory.mktemp("light")
    train(experiment, workdir)
    return experiment, workdir


PLACES = [("batch", step) for step in (1, 2, 3, 5, 8)]
PLACES += [("evaluation", 4), ("evaluation", 8), ("save", 2), ("save", 4), ("save", 6), ("save", 8)]


@pytest.mark.parametrize(("place", "step"), grid(PLACES, ("save", 6)))
def test_stopped_anywhere(light_unbroken, tmp_path, place, step):
    experiment, unbroken = light_unbroken
    run_until_stopped(experiment, tmp_path, place, step)
    train(experiment, tmp_path)
    assert_same_run(tmp_path, unbroken, experiment)


def test_throughput_counts_what_was_trained_since_it_was_started(light_unbroken, tmp_path):
    """Not what a checkpoint's sums hold of steps before it: reports are of steps 3, 6 and 8, checkpoints of 4."""
    experiment, _ = light_unbroken
    run_until_stopped(experiment, tmp_path, "batch", 6)
    train(experiment, tmp_path)
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    trained = {r["step"]: r["elements_per_second"] * r["seconds"] for r in records if r["kind"] == "train"}
    lengths = [int(experiment.task.train_batch(step)["lengths"].sum()) for step in range(8)]
    assert trained[6] == pytest.approx(sum(lengths[4:6]), rel=1e-3)
    assert trained[8] == pytest.approx(sum(lengths[6:8]), rel=1e-3)


@pytest.mark.breadth  # test_stopped_anywhere
def test_stopped_again_and_again(light_unbroken, tmp_path):
    experiment, unbroken = light_unbroken
    for place, step in (("batch", 3), ("save", 4), ("evaluation", 4), ("batch", 5), ("save", 6), ("save", 8)):
        run_until_stopped(experiment, tmp_path, place, step)
    train(experiment, tmp_path)
    assert_same_run(tmp_path, unbroken, experiment)


def test_the_newest_checkpoint_is_lost(light_unbroken, tmp_path):
    experiment, unbroken = light_unbroken
    workdir = Path(shutil.copytree(unbroken, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints/8")
    shutil.rmtree(workdir / "checkpoints/6")
    (workdir / METRICS_FILE).write_text((workdir / METRICS_FILE).read_text() + '{"step": 9, "ki')
    train(experiment, workdir)
    assert_same_run(workdir, unbroken, experiment)


@pytest.mark.breadth  # test_stopped_anywhere, whose comparison it tries
def test_the_comparison_can_fail(light, light_unbroken, tmp_path):
    """Another seed, and a run that replays batches instead of continuing, are told apart."""
    experiment, unbroken = light_unbroken
    other = light({**PLAN, "model.dropout": 0.3, "train.accumulate": 2, "seed": 1})
    train(other, tmp_path / "seed")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "seed", unbroken, experiment)
    run_until_stopped(experiment, tmp_path / "replay", "batch", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(experiment.task), "train_batches", lambda task, _: map(task.train_batch, itertools.count()))
        train(experiment, tmp_path / "replay")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "replay", unbroken, experiment)


@pytest.mark.slow
def test_a_seqboat_with_all_moving_parts(tiny, tmp_path):
    """Dropout of every kind, batch norm, a centred router, accumulated parts and an activation penalty."""
    experiment = build(tiny({**PLAN, **MOVING_PARTS}))
    train(experiment, tmp_path / "unbroken")
    run_until_stopped(experiment, tmp_path / "broken", "batch", 5)
    train(experiment, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", experiment)


# Real processes, killed


# `python -m experiments.train`, slowed so that a signal finds it between steps, with a place to die in.
PROCESS = """
import os, runpy, signal, sys, time
from experiments.training import loop
from experiments.training import manifest
from experiments.tasks.base import ClassificationTask

place, step = sys.argv[1], int(sys.argv[2])
sys.argv = ["train", *sys.argv[3:]]
batches = ClassificationTask.train_batches

def slowly(task, start):
    for number, batch in enumerate(batches(task, start), start=start + 1):
        time.sleep(0.02)
        yield batch
        print("step", number, flush=True)

ClassificationTask.train_batches = slowly

def die_in(owner, name, step_of):
    method = getattr(owner, name)
    def dying(*arguments):
        if step_of(arguments) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)
    setattr(owner, name, dying)

if place == "save":
    die_in(loop._Run, "save", lambda arguments: arguments[1])
if place == "async save":
    die_in(manifest, "write", lambda arguments: arguments[1])
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""

LONG = {"train.steps": 40, "train.log_every": 7, "train.evaluate_every": 10, "train.checkpoint_every": 5}


@pytest.fixture(scope="module")
def command(tiny) -> list[str]:
    changes = {**LONG, **MOVING_PARTS}
    values = tiny(changes)
    flags = [
        f"--config.{group}.{name}={value}"
        for group in ("task", "train", "model", "optimizer")
        for name, value in values[group].items()
        if not isinstance(value, dict | tuple) and value is not None
    ]
    return ["--config=configs/quickstart.py", *flags, "--config.model.router.centered=True"]


def start(command: list[str], workdir: Path, place: str = "", step: int = 0) -> subprocess.Popen:
    arguments = [sys.executable, "-c", PROCESS, place, str(step), *command, f"--workdir={workdir}"]
    cache = os.path.expanduser("~/.cache/seqboat/tests")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen, step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == f"step {step}\n":
            return
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    process = start(command, workdir)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    return workdir


def finish(command: list[str], workdir: Path) -> str:
    process = start(command, workdir)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    return output


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(3, 12, 26), (5, 20, 35), (8, 9, 39)], ids=str)
def test_killed_three_times(tiny, command, unbroken, tmp_path, kills):
    """SIGKILL right after a step, among them steps whose checkpoint is being written."""
    for step in kills:
        process = start(command, tmp_path)
        wait_for(process, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(command, tmp_path)
    assert_same_run(tmp_path, unbroken, build(tiny({**LONG, **MOVING_PARTS})))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "step"), [("save", 10), ("save", 20), ("async save", 20)])
def test_killed_in_a_save_and_between_evaluation_and_save(tiny, command, unbroken, tmp_path, place, step):
    process = start(command, tmp_path, place, step)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    resumed = re.search(r"resuming from step (\d+) of", finish(command, tmp_path))
    assert resumed is None or int(resumed[1]) < step  # the save before may have been under way as well
    assert_same_run(tmp_path, unbroken, build(tiny({**LONG, **MOVING_PARTS})))


@pytest.mark.slow
def test_asked_to_stop(tiny, command, unbroken, tmp_path):
    """SIGTERM, twice: the step under way is saved, the exit code is 0, and the same command resumes there."""
    stopped = []
    for step in (7, 23):
        process = start(command, tmp_path)
        wait_for(process, step)
        process.terminate()
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        saved = re.search(r"asked to stop: saved step (\d+); run the same command to resume", output)
        assert saved is not None, output
        stopped.append(int(saved[1]))
        assert step < stopped[-1] < 40
    assert stopped[0] < stopped[1]
    assert f"resuming from step {stopped[1]} of" in finish(command, tmp_path)
    assert_same_run(tmp_path, unbroken, build(tiny({**LONG, **MOVING_PARTS})))


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tiny, command, unbroken, tmp_path):
    """SIGKILL anywhere from the first import to the last save; SEQBOAT_TEST_SEED draws other moments."""
    draw = random.Random(int(os.environ.get("SEQBOAT_TEST_SEED", "0")))
    began = time.monotonic()
    finish(command, tmp_path / "timed")
    whole = time.monotonic() - began
    directory, killed = 0, 0
    while killed < 20:
        workdir = tmp_path / str(directory)
        process = start(command, workdir)
        try:
            process.communicate(timeout=draw.uniform(0, whole))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0
        assert_same_run(workdir, unbroken, build(tiny({**LONG, **MOVING_PARTS})))
        directory += 1
    finish(command, tmp_path / str(directory))
    assert_same_run(tmp_path / str(directory), unbroken, build(tiny({**LONG, **MOVING_PARTS})))
