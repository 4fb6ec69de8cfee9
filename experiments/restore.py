"""Trained parameters from a work directory, or from a file of the published implementation."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.build import Experiment, build, build_model, read_config, read_task
from experiments.checkpoints import Checkpoints
from experiments.errors import UserError
from seqboat import hyper
from seqboat.interop import reference
from seqboat.models.classifier import Classifier
from seqboat.models.language_model import LanguageModel

CHECKPOINTS = "checkpoints"
SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, `run.model.apply(run.variables, inputs, lengths)`, the step it is of, whether that is the best
    one, and its task's batches."""

    experiment: Experiment
    variables: dict[str, Any]
    step: int
    best: bool = True

    @property
    def model(self) -> Any:
        return self.experiment.model

    @property
    def task(self) -> Any:
        return self.experiment.task


def load(
    workdir: str | Path,
    step: int | None = None,
    data_dir: str | None = None,
    at: tuple[float, ...] | None = None,
) -> Run:
    """The model of a work directory with the parameters of a step: the best one by default, else the newest.

    Nothing but the work directory is needed, and `data_dir` where its data now lies elsewhere. `at`: the hyper-input
    that its task is evaluated at, if a hypernetwork generates its parameters. Raises UserError.
    """
    values = _values(Path(workdir), step)
    if at is not None:
        if not values.get("hyper"):
            raise UserError(f"--at: no hypernetwork generates the parameters of the run in {workdir}")
        values["hyper"] = {**values["hyper"], "at": at}
    if data_dir is not None:
        values["data_dir"] = data_dir
    experiment = build(values, one_device=True)
    with _open(experiment.task, Path(workdir)) as checkpoints:
        best = checkpoints.best_step()
        params, stats = _abstract(experiment)
        restored = checkpoints.restore_params(best if step is None else step, params, stats)
    return Run(experiment, restored.state, restored.step, best=step is None or step == best)


def has_hyper(workdir: Path) -> bool:
    """Whether a hypernetwork generates the parameters of a run."""
    return bool(_values(workdir).get("hyper"))


def bound(run: Run) -> Run:
    """A plain run: the parameters that a hypernetwork generates at the middle one of its evaluation's inputs."""
    if run.experiment.config.hyper is None:
        return run
    condition = jax.numpy.asarray(middle(run.task))
    plain = build({**run.experiment.values, "hyper": None}, one_device=True)
    return Run(plain, hyper.bind(run.model, run.variables, condition), run.step)


def middle(task: Any) -> np.ndarray:
    """The middle one of the hyper-inputs that a task is evaluated at."""
    conditions = task.evaluated()
    return conditions[len(conditions) // 2]


def load_language_model(workdir: Path, step: int | None = None) -> tuple[LanguageModel, dict[str, Any], int]:
    """The model of a work directory, its variables and their step, as `load`; without its data. Raises UserError."""
    config = read_config(_values(workdir, step))
    task, sizes = read_task(config)
    model = build_model(config.model, sizes)
    if not isinstance(model, LanguageModel):
        raise UserError(f"{workdir} holds a {type(model).__name__}: this needs a language model (configs/lm)")
    if config.hyper is not None:
        raise UserError(f"{workdir} holds a hypernetwork: this needs a language model with parameters of its own")
    symbols, one = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, 1), (1,)))
    variables = jax.eval_shape(model.init, jax.random.key(0), symbols, one)
    with _open(task.Task, workdir) as checkpoints:
        chosen = step if step is not None else checkpoints.best_step()
        restored = checkpoints.restore_params(chosen, variables["params"], variables.get("batch_stats", {}))
    return model, restored.state, restored.step


def initial_variables(experiment: Experiment, source: Path) -> dict[str, Any]:
    """Parameters and batch statistics to start from: of another run's best step, or of a published state dict.

    A hypernetwork that adds to its target's parameters may start from a run of the target alone.
    """
    params, stats = _abstract(experiment)
    if source.is_dir():
        if experiment.config.hyper is not None and not _values(source).get("hyper"):
            return _around(experiment, load(source))
        with _open(experiment.task, source) as checkpoints:
            return checkpoints.restore_params(checkpoints.best_step(), params, stats).state
    if not source.is_file():
        raise UserError(f"--init_from={source}: there is neither a work directory nor a file")
    model = experiment.model
    if not isinstance(model, Classifier):
        raise UserError(
            f"--init_from={source}: a published state dict is of a classifier, this is {type(model).__name__}"
        )
    channels = experiment.task.train_batch(0)["inputs"].shape[-1]
    try:
        variables = reference.convert_classifier(read_state(source), model.config, channels)
    except ValueError as error:
        raise UserError(f"--init_from={source}: {error}") from error
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _values(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """The config of a checkpoint."""
    with Checkpoints(_checkpoints(workdir), best_metric="", read_only=True) as checkpoints:
        meta = checkpoints.read_meta(step)
    if not isinstance(meta.get("config"), Mapping):
        raise UserError(f"the checkpoint in {workdir} holds no config: was it made by another program?")
    return dict(meta["config"])


def _around(experiment: Experiment, target: Run) -> dict[str, Any]:
    """A new hypernetwork around a trained target."""
    state = jax.jit(lambda: experiment.steps.init(experiment.config.seed))()
    try:
        return hyper.start_from({"params": state.params, "batch_stats": state.batch_stats}, target.variables)
    except ValueError as error:
        raise UserError(f"--init_from: {error}") from error


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz, safetensors or PyTorch file by name. Nothing in the file is executed."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".npz":
            # Opened here: of a file cut short np.load forgets to close what it opened.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            other = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
            if other:
                raise ValueError(f"{other[0]} is no array")
            return arrays
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package {error.name}; pip install {error.name}") from error
    except Exception as error:  # whatever a broken or hostile file makes its reader raise
        raise UserError(
            f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(array, torch.Tensor) for array in state.values()):
        raise UserError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return {name: array.float().numpy() for name, array in state.items()}


def _checkpoints(workdir: Path) -> Path:
    if not workdir.is_dir():
        raise UserError(f"there is no work directory {workdir}")
    return workdir / CHECKPOINTS


def _open(task: Any, workdir: Path) -> Checkpoints:
    return Checkpoints(
        _checkpoints(workdir), best_metric=task.headline, higher_is_better=task.higher_is_better, read_only=True
    )


def _abstract(experiment: Experiment) -> tuple[Any, Any]:
    state = jax.eval_shape(lambda: experiment.steps.init(experiment.config.seed))
    return state.params, state.batch_stats
