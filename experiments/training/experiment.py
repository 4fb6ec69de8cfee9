"""From a config's values to a model, an optimiser and a task: the only place that knows both worlds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.common.config import at_most, to_dataclass
from experiments.common.errors import UserError
from experiments.common.plugs import find
from experiments.tasks import activations
from experiments.tasks.conditioned import Conditioned, HyperOptions
from experiments.training.models import build_bottlenecked, build_hyper, build_model, example_of, named
from experiments.training.optimizers import OptimizerConfig, make_optimizer
from experiments.training.sharding import OneDevice, Partition, make_partition
from experiments.training.step import ShardedStep, StepFunctions, initial_variables
from experiments.training.trackers import TrackerName
from seqboat.hyper import Hyper
from seqboat.models.bottlenecked import Bottlenecked, CodebookConfig
from seqboat.models.dictionary import Dictionary
from seqboat.models.language_model import LanguageModel
from seqboat.models.stackvae import StackVAE


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how often, in training steps. `batch_size` is that of one step over all processes.

    `accumulate` computes a batch in that many parts. `activation_penalty` is the loss's weight of the mean probability
    of activating. The newest `keep_checkpoints` and the best are kept. `trackers` get the metrics too (`trackers.py`).
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    log_every: int = 50
    evaluate_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    activation_penalty: float = 0.0
    trackers: tuple[TrackerName, ...] = ()

    def __post_init__(self):
        for field in (
            "batch_size",
            "accumulate",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: must not be negative")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate}: must divide batch_size={self.batch_size}")
        if not self.activation_penalty >= 0:
            raise ValueError(f"activation_penalty={self.activation_penalty}: must not be negative")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment. `model` and `task` are groups whose fields depend on their `name`.

    `hypernetwork` generates parameters of the model; None means no hypernetwork. `codebook` quantizes its values; None
    means no codebooks.
    `mesh` names the axes of the mesh of all devices, data, fsdp, fsdp_hidden and sequence, with sizes ("data=4,fsdp=2")
    or without ("data"); or is "pmap"; None is one device.
    `objectives` has a group of fields for each file of experiments/objectives that adds to the loss; None is none.
    `data_dir` holds prepared tensorflow-datasets; None is TFDS_DATA_DIR or ~/tensorflow_datasets.
    """

    task: dict
    model: dict
    optimizer: OptimizerConfig
    train: TrainConfig
    hypernetwork: HyperOptions | None = None
    mesh: str | None = None
    seed: int = at_most(2**63 - 1, default=0)
    data_dir: str | None = None
    objectives: dict | None = None
    codebook: CodebookConfig | None = None

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:  # what a key of jax and grain's shuffle take
            raise ValueError(f"seed={self.seed}: must be in 0..{2**32 - 1}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """`values` is the config as plain values, what a checkpoint carries."""

    values: dict[str, Any]
    config: Config
    model: Any
    task: Any
    functions: StepFunctions
    partition: Partition

    @property
    def seed(self) -> np.uint32:
        """What steps and initialisation take: a uint32, as jit refuses Python integers from 2^31 on."""
        return np.uint32(self.config.seed)

    @property
    def network(self) -> Any:
        """The model that computes a result: the target of a hypernetwork, or of codebooks."""
        return self.model.target if isinstance(self.model, Hyper | Bottlenecked) else self.model

    def describe(self) -> str:
        encoder = getattr(self.network.config, "encoder", None)
        start = f"{self.values['task']['name']}: "
        if self.config.hypernetwork is not None:
            leaves = self.model.network.spec
            start += (
                f"{leaves.size:,} parameters in {len(leaves.leaves)} arrays from {self.config.hypernetwork.condition}, "
            )
        if self.config.codebook is not None:
            start += f"codebooks at {', '.join(self.config.codebook.sites)}: "
        if encoder is None:
            return start + f"a {type(self.network).__name__}"
        layer = encoder.layer
        about = layer.describe(streaming=self.functions.num_streams > 0)
        return f"{start}{encoder.layers} layers, width {layer.features}, {about}"


def build(values: Mapping[str, Any], *, one_device: bool = False) -> Experiment:
    """Everything of an experiment, validated: raises UserError with the field and what it wants, before any compile.

    `one_device` leaves the config's mesh out.
    """
    plain: dict[str, Any] = _plain(values)
    config = to_dataclass(Config, plain, "config")
    read_objectives(config)
    partition = OneDevice() if one_device else make_partition(config.mesh)
    task = build_task(config, partition.rows)
    model: Any = build_model(config.model, task.config)
    plain["task"] = {**plain["task"], **task.resolved}
    example = task.example()
    _check_rate(config, model)
    if config.hypernetwork is not None:
        if partition.layout.sizes:
            raise UserError(f"config.mesh={config.mesh!r}: with config.hypernetwork a run takes one device")
        model = _generated(config, model, example)
    if config.codebook is not None:
        model = _quantized(config, model, example)
    carry = _carries(config, task, model, partition)
    sharded = _sharded(config, task, model, partition, example)
    functions = StepFunctions(
        model,
        task.loss,
        lambda params: make_optimizer(config.optimizer, config.train.steps, params),
        {name: np.asarray(array) for name, array in example.items()},
        accumulate=config.train.accumulate,
        activation_penalty=config.train.activation_penalty,
        num_streams=config.train.batch_size if carry else 0,
        evaluation_metrics=task.evaluation_metrics,
        sharded=sharded,
    )
    return Experiment(plain, config, model, task, functions, partition)


def _check_rate(config: Config, model: nn.Module) -> None:
    encoder = getattr(model.config, "encoder", None)
    if encoder and encoder.layer.rate_control() and config.train.activation_penalty:
        raise UserError(
            f"config.train.activation_penalty={config.train.activation_penalty:g}: must be 0 with "
            f"config.model.router.target_rate={encoder.layer.router.target_rate:g}, which decides the rate itself"
        )


def build_network(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model alone, and the shapes of its `params` and `batch_stats`. Reads no data, unless the task's inputs are
    numbers and its config does not say how many `channels` they have. Raises UserError as `build` does."""
    config = read_config(values)
    _, sizes = read_task(config)
    model: Any = build_model(config.model, sizes)
    example = example_of(model, sizes)
    if example is None:
        example = build_task(dataclasses.replace(config, hypernetwork=None)).example()
    if config.hypernetwork is not None:
        model = _generated(config, model, example)
        example["condition"] = np.zeros((1, config.hypernetwork.network.encoding.inputs), np.float32)
    if config.codebook is not None:
        model = _quantized(config, model, example)
    return model, shapes_of(model, example, config.seed)


def shapes_of(model: Any, example: dict[str, Any], seed: int) -> dict[str, Any]:
    """Those of `params` and `batch_stats`, from a trace of the model on such an example."""
    return jax.eval_shape(lambda: initial_variables(model, example, seed))


def _generated(config: Config, target: nn.Module, example: Mapping[str, Any]) -> Hyper:
    """The model whose parameters `config.hypernetwork` generates."""
    options: Any = config.hypernetwork
    penalized = config.train.activation_penalty and hasattr(target.config, "encoder")  # type: ignore[attr-defined]
    if options.condition == "penalty" and not penalized:
        raise UserError(
            "config.hypernetwork.condition='penalty' wants a model with attention, and in "
            "config.train.activation_penalty the penalty at hyper-input 1, above 0"
        )
    return build_hyper(target, options, example)


def _quantized(config: Config, target: nn.Module, example: Mapping[str, Any]) -> Bottlenecked:
    """The model with the codebooks of `config.codebook`."""
    for other in ("hypernetwork", "mesh", "objectives"):
        if (value := getattr(config, other)) is not None:
            found = f"={value!r}" if isinstance(value, str) else ""
            raise UserError(f"config.{other}{found}: not together with config.codebook; remove one of them")
    return build_bottlenecked(target, config.codebook, example)  # type: ignore[arg-type]


def _carries(config: Config, task: Any, model: nn.Module, partition: Partition) -> bool:
    """Whether training hands a state on; raises UserError for a model that has none, or a mesh that cannot split it."""
    where = "config.task.carry_state=True"
    if not getattr(task.config, "carry_state", False):
        return False
    network = model.target if isinstance(model, Bottlenecked) else model
    if not isinstance(network, LanguageModel):
        raise UserError(
            f"{where}: {type(model).__name__ if config.hypernetwork is None else 'config.hypernetwork'} has no state "
            "to carry; train a language model with parameters of its own"
        )
    if config.mesh == "pmap" or partition.layout.length:
        raise UserError(
            f"{where}: a mesh may split the streams, not their pieces, and not by pmap; config.mesh={config.mesh!r} is "
            "none of data, fsdp, fsdp_hidden and mixtures"
        )
    try:
        network.initial_state(1)
    except ValueError as error:
        raise UserError(f"{where}: config.model.{error}") from error
    return True


def _sharded(
    config: Config, task: Any, model: nn.Module, partition: Partition, example: Mapping[str, Any]
) -> ShardedStep | None:
    """The model of a device's part, on parameters that its layout can split; raises UserError where it cannot."""
    layout, where = partition.layout, f"config.mesh={config.mesh!r}"
    if not layout.sizes:
        return None
    if isinstance(model, Dictionary):
        raise UserError(f"{where}: a Dictionary takes one device, as its statistics are of whole batches")
    if isinstance(model, StackVAE) and set(layout.axes) - {"data"}:
        raise UserError(f"{where}: a StackVAE reads whole windows by whole parameters; only data may split its batches")
    size, parts = config.train.batch_size // config.train.accumulate, layout.size(layout.batch)
    if size % parts:
        raise UserError(
            f"{where}: {parts} devices cannot share batches of {size} examples"
            + (" (batch_size / accumulate)" if config.train.accumulate > 1 else "")
        )
    length = example["inputs"].shape[1]
    if layout.length and length % layout.size((layout.length,)):
        raise UserError(f"{where}: {layout.size((layout.length,))} devices cannot share sequences of {length} elements")
    inputs, lengths = (jax.ShapeDtypeStruct(example[name].shape, example[name].dtype) for name in ("inputs", "lengths"))
    params = jax.eval_shape(model.init, jax.random.key(0), inputs, lengths)["params"]
    optimizer = make_optimizer(config.optimizer, config.train.steps, params)
    try:
        layout.of_parameters(params)
        layout.of_parameters(jax.eval_shape(optimizer.init, params))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return ShardedStep(build_model(config.model, task.config, layout), layout, partition.mesh)


def build_task(config: Config, rows: tuple[int, int] = (0, 1)) -> Any:
    """`rows`: which part of every batch it reads, of how many."""
    module, task_config = read_task(config)
    batching = {
        "batch_size": config.train.batch_size,
        "seed": config.seed,
        "process_index": rows[0],
        "process_count": rows[1],
    }
    if isinstance(task_config, activations.Config):
        from experiments.training.activations import Activations  # which builds another experiment

        task = module.Task(Activations(task_config, config.data_dir), **batching)
    else:
        task = module.Task(task_config, data_dir=config.data_dir, **batching)
    return task if config.hypernetwork is None else Conditioned(task, config.hypernetwork, config.seed)


def read_config(values: Mapping[str, Any]) -> Config:
    """The config alone, of values as a file or a checkpoint has them."""
    return to_dataclass(Config, _plain(values), "config")


def read_task(config: Config) -> tuple[Any, Any]:
    """The task's module and its config, without its data."""
    name, fields = named(config.task, "config.task")
    module = find("experiments.tasks", name, "config.task.name", "Config")
    return module, to_dataclass(module.Config, fields, "config.task")


def read_objectives(config: Config) -> dict[str, tuple[Any, Any]]:
    """The module and the config of every objective, by name."""
    found = {}
    for name, fields in (config.objectives or {}).items():
        module = find("experiments.objectives", name, "config.objectives", "Config", "Objective")
        where = f"config.objectives.{name}"
        if not isinstance(fields, Mapping):
            raise UserError(f"{where}={fields!r}: expected a group of fields")
        found[name] = module, to_dataclass(module.Config, fields, where)
    return found


def _plain(values: Any) -> Any:
    """Nested mappings as dicts and sequences as tuples, so that a config and its JSON read the same."""
    if isinstance(values, Mapping):
        return {name: _plain(value) for name, value in values.items()}
    return tuple(_plain(value) for value in values) if isinstance(values, list | tuple) else values
