"""Trackers that a run reports to beside its metrics file: TensorBoard, Weights & Biases, MLflow.

None is imported unless `config.train.trackers` names it. A resumed run continues the same run of its tracker, whose
name there is kept in WORKDIR/trackers.json; a run from the beginning is a new one.
"""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from absl import logging

from experiments.common.errors import UserError
from experiments.common.files import read_json, write_json

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
# The package of each, to install.
PACKAGES: dict[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
TRACKERS_FILE = "trackers.json"
PROJECT = "seqboat"

Scalars = Mapping[str, float]


class Tracker(Protocol):
    """`identity` is what a resumed run continues with; None if the work directory suffices. `needs_history`: whether a
    resumed run has to be reported from its first step."""

    identity: str | None
    needs_history: bool

    def log(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in WORKDIR/tensorboard. TensorBoard discards earlier events from the step resumed from on."""

    identity: str | None = None
    needs_history = False

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any], identity: str | None):
        from tensorboardX import SummaryWriter

        purge = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(logdir=str(workdir / "tensorboard"), purge_step=purge)

    def log(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, by its own environment variables: WANDB_MODE=offline, WANDB_PROJECT and the like.

    It takes steps in ascending order only. Those between a checkpoint and a kill, which a resumed run repeats with the
    same values, are left out. Offline it cannot continue a run: it writes a second folder for the same one, and the
    folder that is uploaded last replaces the other. So each folder has all steps.
    """

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any], identity: str | None):
        import wandb

        self.identity: str | None = identity or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", workdir.name),
            id=self.identity,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.needs_history: bool = self._run.offline

    def log(self, step: int, scalars: Scalars) -> None:
        if step >= self._run.step:
            self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow at MLFLOW_TRACKING_URI, by default the SQLite database WORKDIR/mlflow.db (MLflow 3 refuses plain
    files), in the experiment MLFLOW_EXPERIMENT_NAME. Repeated steps are there twice, with equal values."""

    needs_history = False

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any], identity: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir / 'mlflow.db'}")
        if identity is not None:
            self.identity: str | None = identity
            self._client.update_run(identity, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        self.identity = self._client.create_run(experiment, run_name=workdir.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flat(config, "config").items()]
        for first in range(0, len(params), 100):  # the most that it takes at once
            self._client.log_batch(self.identity, params=params[first : first + 100])

    def log(self, step: int, scalars: Scalars) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.identity)


KINDS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
assert tuple(KINDS) == tuple(PACKAGES) == get_args(TrackerName)


class Trackers:
    """All trackers of a run. Raises UserError for one that cannot be opened; one that fails later is closed with a
    warning, since a run is worth more than its curve, which is in the metrics file too. `history` is what was reported
    before `start_step`."""

    def __init__(
        self,
        names: tuple[str, ...],
        workdir: Path,
        start_step: int,
        config: Mapping[str, Any],
        history: Iterable[tuple[int, Scalars]] = (),
    ):
        known = _identities(workdir) if start_step else {}
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            self._open[name] = _opened(name, workdir, start_step, config, known.get(name), history)
        known |= {name: tracker.identity for name, tracker in self._open.items() if tracker.identity}
        if known:
            write_json(workdir / TRACKERS_FILE, known)

    def log(self, step: int, scalars: Scalars) -> None:
        self._each(lambda tracker: tracker.log(step, scalars))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open = {}

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:
                logging.warning("%s failed (%s); training continues without it", name, _first_line(error))
                del self._open[name]


def _opened(
    name: str,
    workdir: Path,
    start_step: int,
    config: Mapping[str, Any],
    identity: str | None,
    history: Iterable[tuple[int, Scalars]],
) -> Tracker:
    try:
        tracker = KINDS[name](workdir, start_step, config, identity)
        if start_step and tracker.needs_history:
            for step, scalars in history:
                tracker.log(step, scalars)
        return tracker
    except ImportError as error:
        raise UserError(
            f"config.train.trackers: {name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}, or leave "
            f"{name} out"
        ) from error
    except Exception as error:  # no account, no network, no such run: each library has its own kinds
        hint = "; WANDB_MODE=offline needs no account" if name == "wandb" else ""
        raise UserError(f"config.train.trackers: {name} cannot be opened: {_first_line(error)}{hint}") from error


def _identities(workdir: Path) -> dict[str, str]:
    """What the run was called in each tracker."""
    path = workdir / TRACKERS_FILE
    try:
        found = read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and trackers begin new runs") from error
    return {name: value for name, value in found.items() if isinstance(value, str) and re.fullmatch(r"[\w-]+", value)}


def _flat(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {name: values}
    return {path: leaf for key in values for path, leaf in _flat(values[key], f"{name}.{key}").items()}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
