"""A tiny experiment on short ListOps: a step compiles in seconds and runs in milliseconds."""

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl import flags

from configs import quickstart
from experiments.common import cli
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train
from experiments.training.optimizers import make_optimizer
from experiments.training.step import Steps, TrainState
from seqboat.layers.router import ActivationStats
from seqboat.models.classifier import Output
from seqboat.models.encoder import EncoderConfig
from tests.helpers import SMALL_MODEL

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
    "train.tensorboard": False,
}


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
        )
        return Output(logits, stats)


@pytest.fixture(scope="session")
def light(tiny) -> Callable[..., Experiment]:
    """light({"train.steps": 8}) is the tiny experiment on the light model; `loss` replaces the task's own."""

    def experiment(changes: dict[str, Any] | None = None, loss: Callable | None = None) -> Experiment:
        built = build(tiny(changes))
        config, encoder, task = built.config, built.model.config.encoder, built.task  # type: ignore[attr-defined]
        model = Light(LightConfig(encoder, task.config.classes, task.config.vocabulary_size, encoder.layer.dropout))
        steps = Steps(
            model,
            loss or task.loss,
            lambda params: make_optimizer(config.optimizer, config.train.steps, params),
            task.train_batch(0),
            seed=config.seed,
            accumulate=config.train.accumulate,
            activation_penalty=config.train.activation_penalty,
            evaluation_metrics=task.evaluation_metrics,
        )
        return dataclasses.replace(built, model=model, steps=steps)

    return experiment


@pytest.fixture(scope="session")
def initial() -> Callable[[Experiment], TrainState]:
    """The initial state of an experiment, by the program that the loop compiles."""
    return lambda experiment: jax.jit(functools.partial(experiment.steps.init, experiment.config.seed))()


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """The work directory of a finished run of the tiny SeqBoat. Not to be changed: copy it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(build(tiny()), workdir)
    return workdir
