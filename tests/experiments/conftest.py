"""A tiny experiment on short ListOps: a step compiles in seconds and runs in milliseconds."""

import dataclasses
import functools
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from configs import quickstart
from experiments.common import cli
from experiments.data import identity, listops
from experiments.training import experiment as experiment_module
from experiments.training import restore
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train
from experiments.training.optimizers import make_optimizer
from experiments.training.sharding import OneDevice
from experiments.training.step import StepFunctions, TrainState
from seqboat.layers.router import ActivationStats
from seqboat.models.classifier import Output
from seqboat.models.encoder import EncoderConfig
from tests.helpers import SMALL_MODEL, random_like

TINY = {
    "task.train_examples": 200,
    "task.validation_examples": 40,
    "task.test_examples": 40,
    **SMALL_MODEL,
    "optimizer.warmup_steps": 4,
    "train.steps": 6,
    "train.batch_size": 8,
    "train.log_every": 3,
    "train.evaluate_every": 4,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 3,
}


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> Iterator[None]:
    """Expressions of ListOps, a pure function of their arguments, are drawn once for all tasks of a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listops, "generate_chunk", functools.lru_cache(64)(listops.generate_chunk))
        yield


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """The shapes of a model's variables, which a trace tells, are found once however often a run of it is loaded."""
    found: dict[Any, Any] = {}
    original = experiment_module.shapes_of

    def shapes_of(model, example, seed):
        shapes = tuple((name, np.shape(array), np.result_type(array)) for name, array in sorted(example.items()))
        try:
            known = (model, shapes) in found
        except TypeError:  # a model that is not hashable
            return original(model, example, seed)
        if not known:
            found[model, shapes] = original(model, example, seed)
        return jax.tree.map(lambda leaf: leaf, found[model, shapes])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_module, "shapes_of", shapes_of)
        yield


@pytest.fixture
def typed() -> Callable[..., dict[str, Any]]:
    """typed("--config=FILE", "--config.train.steps=8") is the values that a program would read of these words."""

    def read(*words: str) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(flags, "FLAGS", flags.FlagValues())
            patch.setattr(sys, "argv", ["train", *words])
            patch.delitem(sys.modules, "config_config", raising=False)  # the file that was read before
            warnings.filterwarnings("ignore", message=".*load_module", category=DeprecationWarning)  # ml_collections
            config = cli.define_config()
            cli._parse(sys.argv)
            return cli.read_config(config)

    return read


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """tiny({"train.steps": 8}) is the values of the tiny config with that difference."""

    def values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
        config = quickstart.get_config()
        config.update_from_flattened_dict({**TINY, **(changes or {})})
        return config.to_dict()

    return values


class Remembering(OneDevice):
    """One device that traces and compiles the steps of one experiment once, however often that is trained."""

    programs: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.programs:
            self.programs[key] = make()
        return self.programs[key]

    def abstract(self, init, seed):
        return self.once(("abstract", init), lambda: jax.eval_shape(init, seed))

    def create(self, init, seed):
        return self.once(("create", init), lambda: jax.jit(init))(seed)

    def compile(self, train, state, batch, seed):
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves((state, batch)))
        return self.once((train, shapes), lambda: OneDevice.compile(self, train, state, batch, seed))

    def evaluate(self, evaluate):
        return self.once(evaluate, lambda: jax.jit(evaluate))


# A model of one table instead of a SeqBoat: what the loop and the step do with a model, without its compile time.


@dataclasses.dataclass(frozen=True)
class LightConfig:
    encoder: EncoderConfig
    classes: int
    vocabulary_size: int
    dropout: float = 0.0


class Light(nn.Module):
    """The logits are the mean of the symbols' rows of a table; a symbol is active where its first entry is positive.

    The configurator is `gate`, and only its probability sees it. The running mean of the logits is a batch statistic.
    """

    config: LightConfig

    @nn.compact
    def __call__(self, inputs: jax.Array, lengths: jax.Array, train: bool = False) -> Output:
        config = self.config
        table = self.param("table", nn.initializers.normal(1.0), (config.vocabulary_size, config.classes))
        gate = self.param("gate", nn.initializers.ones, (config.classes,))
        valid = (jnp.arange(inputs.shape[1])[None] < lengths[:, None]).astype(jnp.float32)
        rows = nn.Dropout(config.dropout)(table[inputs], deterministic=not train)
        logits = (rows * valid[..., None]).sum(1) / jnp.maximum(lengths, 1)[:, None]
        mean = self.variable("batch_stats", "mean", jnp.zeros, config.classes)
        if train and not self.is_initializing():
            mean.value = 0.5 * mean.value + 0.5 * logits.mean(0)
        probability = jax.nn.sigmoid(rows @ gate) * valid
        active = (probability > 0.5).astype(jnp.float32)
        layers = config.encoder.layers
        one = lambda value: jnp.broadcast_to(value.sum(), (layers, 1))
        stats = ActivationStats(
            one(active),
            one(jnp.maximum(probability, 1 - probability) * active),
            one(probability),
            jnp.broadcast_to(valid.sum(), (layers,)),
            jnp.ones((layers, 1)),
            jnp.ones((layers, 1)),
        )
        return Output(logits, stats)


# What differs between experiments with the same steps.
PLAN = ("steps", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "trackers")


@pytest.fixture(scope="session")
def light(tiny, remembering) -> Callable[..., Experiment]:
    """light({"train.steps": 8}) is the tiny experiment on the light model; `loss` replaces the task's own.

    Those with the same steps share their programs, as the learning rate is always that of the tiny plan.
    """
    shared: dict[str, StepFunctions] = {}

    def make_functions(built: Experiment, loss: Callable | None) -> StepFunctions:
        config, encoder, task = built.config, built.model.config.encoder, built.task  # type: ignore[attr-defined]
        model = Light(LightConfig(encoder, task.config.classes, task.config.vocabulary_size, encoder.layer.dropout))
        return StepFunctions(
            model,
            loss or task.loss,
            lambda params: make_optimizer(config.optimizer, TINY["train.steps"], params),
            task.train_batch(0),
            accumulate=config.train.accumulate,
            activation_penalty=config.train.activation_penalty,
            evaluation_metrics=task.evaluation_metrics,
        )

    def experiment(changes: dict[str, Any] | None = None, loss: Callable | None = None) -> Experiment:
        built = build(tiny(changes))
        settings = {name: value for name, value in built.values["train"].items() if name not in PLAN}
        key = json.dumps({**built.values, "train": settings, "seed": 0})
        functions = shared.get(key) if loss is None else None
        functions = functions or make_functions(built, loss)
        if loss is None:
            shared[key] = functions
        return remembering(dataclasses.replace(built, model=functions.model, functions=functions))

    return experiment


@pytest.fixture
def built_light(light, monkeypatch) -> Callable[..., Callable]:
    """built_light(module, ...) makes these modules, and restoring, build the light experiment of a config's seed and
    steps; returns that function."""

    def build(values, one_device=False):
        return light({"seed": values["seed"], "train.steps": values["train"]["steps"]})

    def network(values):
        built = build(values)
        return built.model, jax.eval_shape(lambda: built.functions.variables(0))

    def patch(*modules):
        for module in (restore, *modules):
            monkeypatch.setattr(module, "build", build)
        monkeypatch.setattr(restore, "build_network", network)
        return build

    return patch


@pytest.fixture(scope="session")
def initial() -> Callable[[Experiment], TrainState]:
    """The initial state of an experiment, by the program that the loop compiles."""
    return lambda experiment: experiment.partition.create(experiment.functions.init, experiment.seed)


@pytest.fixture(scope="session")
def remembering() -> Callable[[Experiment], Experiment]:
    """remembering(experiment) is that experiment on one device, its steps compiled once."""
    return lambda experiment: dataclasses.replace(experiment, partition=Remembering())


@pytest.fixture(scope="session")
def seqboat(tiny, remembering) -> Experiment:
    """The tiny SeqBoat."""
    return remembering(build(tiny()))


@pytest.fixture(scope="session")
def trained(seqboat, tmp_path_factory) -> Path:
    """The work directory of a finished run of the tiny SeqBoat. Not to be changed: copy it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(seqboat, workdir)
    return workdir


def random_variables(experiment: Experiment) -> dict[str, Any]:
    """Random parameters, of which the router's bias makes some elements active, and some not; nothing is compiled."""
    variables = random_like(jax.eval_shape(lambda: experiment.functions.variables(experiment.config.seed)))
    sparse = variables["params"].get("encoder", {}).get("layers", {}).get("sparse", {})
    if "configurator" in sparse:
        logits = sparse["configurator"]["logits"]
        logits["bias"] = jnp.zeros_like(logits["bias"]).at[:, 1::2].set(2.0)
    return variables


@pytest.fixture(scope="session")
def random_state() -> Callable[[Experiment], TrainState]:
    """The state of a first step with random parameters."""

    def state(experiment: Experiment) -> TrainState:
        shapes = jax.eval_shape(lambda: experiment.functions.init(experiment.config.seed))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        return dataclasses.replace(zeros, **random_variables(experiment), bad_step=np.int32(-1))

    return state


@pytest.fixture(scope="session")
def untrained(random_state) -> Callable[..., Path]:
    """untrained(values, workdir) is that work directory, with a checkpoint of `random_variables`.

    `whole` saves all that a run needs to resume. What is saved of a config is made once.
    """
    made: dict[str, tuple[Experiment, Any]] = {}

    def save(values: dict[str, Any], workdir: Path, step: int = 0, whole: bool = False, **metrics: float) -> Path:
        key = json.dumps([values, whole])
        if key not in made:
            experiment = build(values)
            made[key] = experiment, random_state(experiment) if whole else random_variables(experiment)
        experiment, state = made[key]
        task = experiment.task
        meta = {"config": values, "versions": {"jax": "1"}, "data": identity.remember(task)}
        best = {"best_metric": task.selection_metric, "higher_is_better": task.higher_is_better}
        with Checkpoints(workdir / "checkpoints", keep=9, **best) as checkpoints:
            checkpoints.save(step, state, meta, metrics or None)
        return workdir

    return save


@pytest.fixture(scope="session")
def recorded(tiny, light, untrained, tmp_path_factory) -> Path:
    """What a finished run of the tiny SeqBoat leaves, without its compile time: random parameters, of which those of
    step 4 are the best, and the light model's metrics. Not to be changed: copy it."""
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    train(light(), workdir)
    shutil.rmtree(workdir / "checkpoints")
    for step, accuracy in ((2, 0.1), (4, 0.3), (6, 0.2)):
        untrained(tiny(), workdir, step, accuracy=accuracy)
    return workdir


@pytest.fixture(scope="session")
def with_feed_forward(tiny, untrained, tmp_path_factory) -> Path:
    """An untrained run of step 4 whose layers have a feed-forward network. Not to be changed."""
    return untrained(tiny({"model.feed_forward_size": 6}), tmp_path_factory.mktemp("feed_forward") / "run", step=4)
