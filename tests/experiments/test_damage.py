"""A damaged work directory: never a wrong number, never a traceback, never the loss of an intact checkpoint."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.training.checkpoints import Checkpoints
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE

PLAN = {"train.steps": 8, "train.evaluate_every": 2, "train.checkpoint_every": 2, "train.keep_checkpoints": 4}


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(max(path.stat().st_size, 1))])


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def append(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 50)))


def garble(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(path.stat().st_size))


def replace_by_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (flip, cut, delete, append, garble, replace_by_folder)


def arrays(state: Any) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore_newest(directory: Path, abstract: Any) -> Any:
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.restore_latest(abstract)


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Its result, or None and what it told the user."""
    try:
        return call(), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.slow
def test_sixty_random_damages(light, tmp_path):
    """SEQBOAT_TEST_SEED draws others."""
    experiment, pristine = light(PLAN), tmp_path / "pristine"
    train(experiment, pristine)
    abstract = jax.eval_shape(lambda: experiment.functions.init(experiment.config.seed))
    with Checkpoints(pristine / "checkpoints", best_metric="accuracy", read_only=True) as checkpoints:
        best, saved = checkpoints.best_step(), {}
        for step in checkpoints.steps():
            saved[step] = arrays(checkpoints.restore(step, abstract).state)
    assert sorted(saved) == [2, 4, 6, 8]
    seed, refused, resumed = os.environ.get("SEQBOAT_TEST_SEED", "0"), 0, 0
    for number in range(60):
        draw, workdir = random.Random(f"{seed} {number}"), tmp_path / str(number)
        shutil.copytree(pristine, workdir)
        files = sorted(path for path in (workdir / "checkpoints").rglob("*") if path.is_file())
        for path in draw.sample([*files, workdir / METRICS_FILE], draw.choice((1, 1, 1, 2, 5, 20))):
            draw.choice(DAMAGES)(path, draw)
        folders = {step: workdir / "checkpoints" / str(step) for step in saved}
        intact = {s for s, f in folders.items() if contents(f) == contents(pristine / "checkpoints" / str(s))}
        restored, message = attempt(lambda workdir=workdir: restore_newest(workdir / "checkpoints", abstract))
        assert "\n" not in message
        assert restored is None or arrays(restored.state) == saved[restored.step], number
        assert restored is not None or not intact, f"{number}: {message}"
        ended, message = attempt(lambda workdir=workdir: train(experiment, workdir))
        assert "\n" not in message
        refused, resumed = refused + (ended is None), resumed + (ended is not None)
        if ended is not None:
            last, _ = attempt(lambda workdir=workdir: restore_newest(workdir / "checkpoints", abstract))
            assert last.step == 8
            assert arrays(last.state) == saved[8], number
        kept = [contents(path) for path in (workdir / "checkpoints").rglob("*") if path.is_dir()]
        for step in intact & {best, max(intact, default=0)}:
            assert contents(pristine / "checkpoints" / str(step)) in kept, f"{number}: step {step} was intact"
        shutil.rmtree(workdir)
    print(f"{resumed} resumed, {refused} refused")
    assert resumed > 20
