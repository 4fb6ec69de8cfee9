"""Trained parameters from a work directory, or from a file of the published implementation."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.data import identity
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import Experiment, build, read_config, read_task
from experiments.training.models import build_model
from seqboat import hyper
from seqboat.interop import published
from seqboat.models.classifier import Classifier
from seqboat.models.language_model import LanguageModel

CHECKPOINTS = "checkpoints"
SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")
# Where checkpoints of PyTorch programs have the state dict, if they hold more.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, `run.model.apply(run.variables, inputs, lengths)`, the step it is of, whether that is the best
    one, its task's batches, and the `meta` dictionary of that step's checkpoint."""

    experiment: Experiment
    variables: dict[str, Any]
    step: int
    best: bool = True
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.experiment.model

    @property
    def task(self) -> Any:
        return self.experiment.task

    @property
    def data_changes(self) -> list[str]:
        """In what its data are not those that it was trained on."""
        return identity.changes(self.meta.get("data"), self.task)


def load(
    workdir: str | Path,
    step: int | None = None,
    data_dir: str | None = None,
    at: tuple[float, ...] | None = None,
) -> Run:
    """The model of a work directory with the parameters of a step: the best one by default, else the newest.

    Nothing but the work directory is needed, and `data_dir` where its data now lies elsewhere. Warns on stderr where
    that is other data than it was trained on. `at`: the hyper-input that its task is evaluated at, if a hypernetwork
    generates its parameters. Raises UserError.
    """
    saved = _Saved(workdir, step)
    saved.verify()  # before its data are read
    values = identity.relocated(saved.values, saved.meta.get("data"), data_dir)
    if at is not None:
        if not values.get("hypernetwork"):
            raise UserError(f"--at: no hypernetwork generates the parameters of the run in {workdir}")
        values["hypernetwork"] = {**values["hypernetwork"], "at": at}
    experiment = build(values, one_device=True)
    run = Run(experiment, saved.restore(*_abstract(experiment)), saved.step, saved.best, saved.meta)
    if changed := run.data_changes:
        print(f"warning: {workdir} was trained on other data: {'; '.join(changed)}", file=sys.stderr, flush=True)
    return run


def has_hyper(workdir: str | Path) -> bool:
    """Whether a hypernetwork generates the parameters of a run's best step."""
    return bool(_Saved(workdir).values.get("hypernetwork"))


class _Saved:
    """One step of a work directory, chosen once: its config, versions and arrays are its own, each verified once.

    `step` None is the best one, else the newest. `best`: whether it is that. Raises UserError.
    """

    def __init__(self, workdir: str | Path, step: int | None = None, what: str = "workdir"):
        self.workdir = user_path(workdir, what)
        if not self.workdir.is_dir():
            raise UserError(f"there is no work directory {self.workdir}")
        self._checkpoints = Checkpoints(self.workdir / CHECKPOINTS, read_only=True)
        best = self._best_step(step)
        chosen = best if step is None else step
        self.step = self._checkpoints.usable(None) if chosen is None else chosen
        self.best = step is None or step == best
        self.meta = self._checkpoints.glance(self.step)
        self.values = self._config(self.meta)

    def verify(self) -> None:
        """Raises UserError where its arrays are damaged."""
        self._checkpoints.usable(self.step)

    def restore(self, abstract_params: Any, abstract_batch_stats: Any) -> dict[str, Any]:
        """Its parameters and batch statistics."""
        return self._checkpoints.restore_params(self.step, abstract_params, abstract_batch_stats).state

    def _best_step(self, step: int | None) -> int | None:
        """By the metric of the task of the step that was asked for, or of the newest."""
        task, _ = read_task(read_config(self._config(self._checkpoints.glance(step))))
        self._checkpoints.rank_by(task.Task.selection_metric, task.Task.higher_is_better)
        return self._checkpoints.best_step()

    def _config(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(meta.get("config"), Mapping):
            raise UserError(f"the checkpoint in {self.workdir} holds no config: was it made by another program?")
        return dict(meta["config"])


def bound(run: Run) -> Run:
    """A plain run: the parameters that a hypernetwork generates at the middle one of its evaluation's inputs."""
    if run.experiment.config.hypernetwork is None:
        return run
    condition = jax.numpy.asarray(middle(run.task))
    plain = build({**run.experiment.values, "hypernetwork": None}, one_device=True)
    bound_variables = hyper.bind(run.model, run.variables, condition)
    return dataclasses.replace(run, experiment=plain, variables=bound_variables)


def middle(task: Any) -> np.ndarray:
    """The middle one of the hyper-inputs that a task is evaluated at."""
    conditions = task.evaluated()
    return conditions[len(conditions) // 2]


def load_language_model(workdir: str | Path, step: int | None = None) -> tuple[LanguageModel, dict[str, Any], int]:
    """The model of a work directory, its variables and their step, as `load`; without its data. Raises UserError."""
    saved = _Saved(workdir, step)
    config = read_config(saved.values)
    _, sizes = read_task(config)
    model = build_model(config.model, sizes)
    if not isinstance(model, LanguageModel):
        raise UserError(f"{workdir} holds a {type(model).__name__}: this needs a language model (configs/lm)")
    if config.hypernetwork is not None:
        raise UserError(f"{workdir} holds a hypernetwork: this needs a language model with parameters of its own")
    symbols, one = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, 1), (1,)))
    variables = jax.eval_shape(model.init, jax.random.key(0), symbols, one)
    return model, saved.restore(variables["params"], variables.get("batch_stats", {})), saved.step


def refuse_no_source(source: Path) -> None:
    """Raises UserError for a path from which no parameters can come, without a look at them."""
    if source.is_dir():
        Checkpoints(source / CHECKPOINTS, read_only=True).glance()
    elif not source.is_file():
        raise UserError(f"--init_from={source}: there is neither a work directory nor a file")
    elif source.suffix not in SUFFIXES:
        raise UserError(f"{source}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")


def initial_variables(experiment: Experiment, source: Path) -> dict[str, Any]:
    """Parameters and batch statistics to start from: of another run's best step, or of a published state dict.

    A hypernetwork that adds to its target's parameters may start from a run of the target alone.
    """
    params, stats = _abstract(experiment)
    refuse_no_source(source)
    if source.is_dir():
        if experiment.config.hypernetwork is not None and not has_hyper(source):
            return _around(experiment, load(source))
        return _Saved(source, what="init_from").restore(params, stats)
    model = experiment.model
    if not isinstance(model, Classifier):
        raise UserError(
            f"--init_from={source}: a published state dict is of a classifier, this is {type(model).__name__}"
        )
    channels = experiment.task.train_batch(0)["inputs"].shape[-1]
    try:
        variables = published.convert_classifier(read_state(source), model.config, channels)
    except ValueError as error:
        raise UserError(f"--init_from={source}: {error}") from error
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _around(experiment: Experiment, target: Run) -> dict[str, Any]:
    """A new hypernetwork around a trained target."""
    state = jax.jit(lambda: experiment.steps.init(experiment.config.seed))()
    try:
        return hyper.start_from({"params": state.params, "batch_stats": state.batch_stats}, target.variables)
    except ValueError as error:
        raise UserError(f"--init_from: {error}") from error


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz, safetensors or PyTorch file by name. Nothing in the file is executed."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".npz":
            # Opened here: of a file cut short np.load forgets to close what it opened.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            other = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
            if other:
                raise ValueError(f"{other[0]} is no array")
            return arrays
        if suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        import torch

        state = _unwrap(torch.load(path, map_location="cpu", weights_only=True))
        if not isinstance(state, dict) or not all(isinstance(array, torch.Tensor) for array in state.values()):
            raise UserError(f"{path} holds no state dict: expected a mapping of names to tensors")
        # Without their gradients, and in a kind that numpy knows.
        plain = lambda array: array.detach().float() if array.is_floating_point() else array
        return {name: plain(array).numpy() for name, array in state.items()}
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package {error.name}; pip install {error.name}") from error
    except UserError:
        raise
    except Exception as error:  # whatever a broken or hostile file makes its reader raise
        raise UserError(
            f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _unwrap(state: Any) -> Any:
    """The state dict of a checkpoint that holds more, as trainers write it."""
    inner = [state[key] for key in STATE_KEYS if isinstance(state, dict) and isinstance(state.get(key), dict)]
    return _unwrap(inner[0]) if inner else state


def _abstract(experiment: Experiment) -> tuple[Any, Any]:
    state = jax.eval_shape(lambda: experiment.steps.init(experiment.config.seed))
    return state.params, state.batch_stats
