"""Guidance by another network's representations (arXiv 2410.20035):

    loss + weight * sum over pairs of layers (1 - CKA(target's layer, guide's layer))

with linear debiased CKA (`seqboat.ops.similarity`) of elements of the batch, between the outputs of layers (the tap
"resid"). The guide reads the same inputs in evaluation mode, and is never trained.

The published code draws whole sequences and uses the biased CKA of fewer rows than features; here rows are elements.
Every device of a mesh draws from its part of the batch. With `config.task.carry_state` the guide has no state.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.common.errors import UserError
from experiments.training.experiment import Experiment, build_network
from experiments.training.restore import load
from experiments.training.step import Batch, initial_variables
from seqboat.models.classifier import Classifier
from seqboat.models.language_model import LanguageModel
from seqboat.ops.similarity import cka

Tree = Any
WHERE = "config.objectives.guidance"


@dataclasses.dataclass(frozen=True)
class Config:
    """The guide is the model of `run`, a work directory, with its best parameters; or one `like` a group as
    `config.model`, not trained, of the task's sizes. It guides the first share `until` of the steps, by `rows` elements
    of a batch, or all if there are fewer. With `shuffled` the guide's elements are in another order than the target's,
    so that what it knows of each is lost: a control."""

    run: str | None = None
    like: dict | None = None
    weight: float = 1.0
    until: float = 0.2
    rows: int = 256
    shuffled: bool = False

    def __post_init__(self):
        if (self.run is None) == (self.like is None):
            raise ValueError(f"run={self.run!r}: set it to a work directory, or like to a group as config.model")
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: must not be negative")
        if not 0 <= self.until <= 1:
            raise ValueError(f"until={self.until}: must be in 0..1, a share of the steps")
        if self.rows < 4:
            raise ValueError(f"rows={self.rows}: must be at least 4, for a debiased CKA")


class Objective:
    """See `experiments.training.objectives`. `remembered` has the config of the guide's run."""

    taps = True

    def __init__(self, config: Config, experiment: Experiment, remembered: Mapping[str, Any] | None):
        self.config, self.experiment = config, experiment
        _refuse(experiment)
        if remembered is not None and remembered["of"] != _plain(config):
            raise UserError(
                f"{WHERE}.run={config.run!r}: this run has had another guide, {_first(remembered['of'])}, and its "
                "checkpoint holds that one; resume with it, or start in another directory"
            )
        self.trained = None
        if remembered is not None:
            self.values = dict(remembered["values"])
        elif config.run is not None:
            self.trained = _load(config.run)
            self.values = self.trained.values
        else:
            self.values = {**experiment.values, "model": config.like, "objectives": None}
        self.model, self.shapes = build_network(self.values)
        _refuse_guide(config, self.model, experiment.network)
        self.last = round(config.until * experiment.config.train.steps)

    def remember(self) -> dict[str, Any]:
        return {"of": _plain(self.config), "values": self.values}

    def abstract(self) -> Tree:
        return self.shapes

    def frozen(self) -> Tree:
        if self.trained is not None:
            return self.trained.variables
        seed = (self.experiment.config.seed + 1) % 2**32  # not the target's own start
        start = jax.jit(lambda seed: initial_variables(self.model, self.experiment.functions.example, seed))
        return start(np.uint32(seed))

    def __call__(self, frozen: Tree, params: Tree, out: Any, taps: Tree, batch: Batch, key: Array, step: Array) -> dict:
        """The sum over max(T, G) pairs of T layers of the target and G of the guide, spread evenly over both."""

        def distance(own):
            inputs, lengths = batch["inputs"], batch["lengths"]
            _, found = self.model.apply(frozen, inputs, lengths, mutable=["taps"])
            chosen, valid = draw_rows(key, lengths, inputs.shape[1], self.config.rows)
            other = shift(chosen, valid) if self.config.shuffled else chosen
            take = lambda layers, rows: layers.reshape(len(layers), -1, layers.shape[-1])[:, rows]
            own, guide = take(own, chosen), jax.lax.stop_gradient(take(_layers(found["taps"]), other))
            here, there = pairs(len(own), len(guide))
            return (1 - jax.vmap(lambda x, y: cka(x, y, valid=valid))(own[here], guide[there])).sum()

        active = step < self.last
        # After the last guided step nothing of it is computed.
        total = jax.lax.cond(active, distance, lambda own: jnp.zeros(()), _layers(taps))
        return {"cka_distance": (self.config.weight, total, active.astype(jnp.float32))}


def draw_rows(key: Array, lengths: Array, length: int, rows: int) -> tuple[Array, Bool[Array, "N"]]:
    """Indices of elements of the flattened batch (B L), different ones in random order, and which of them are valid:
    all, unless the batch has fewer valid ones, which come first then."""
    valid = (jnp.arange(length)[None] < lengths[:, None]).reshape(-1)
    score = jnp.where(valid, jax.random.uniform(key, valid.shape), -1)
    _, chosen = jax.lax.top_k(score, min(rows, len(valid)))
    return chosen, valid[chosen]


def shift(chosen: Array, valid: Bool[Array, "N"]) -> Array:
    """For every valid one of `draw_rows` another valid one, if there are two."""
    count = valid.sum()
    return chosen[(jnp.arange(len(chosen)) + count // 2) % jnp.maximum(count, 1)]


def pairs(layers: int, guide: int) -> tuple[np.ndarray, np.ndarray]:
    """Which layer of each network is in every pair: every layer of both is in one."""
    count = max(layers, guide)
    return np.arange(count) * layers // count, np.arange(count) * guide // count


def _layers(taps: Tree) -> Float[Array, "layers B L D"]:
    return taps["encoder"]["layers"]["resid"]


def _load(run: str) -> Any:
    try:
        return load(run)
    except UserError as error:
        raise UserError(f"{WHERE}.run={run!r}: {error}") from error


def _refuse(experiment: Experiment) -> None:
    config, layout = experiment.config, experiment.partition.layout
    if config.train.accumulate > 1:
        raise UserError(
            f"config.train.accumulate={config.train.accumulate}: must be 1 with {WHERE}, whose rows are a batch's"
        )
    if config.hypernetwork is not None:
        raise UserError(f"config.hypernetwork: a model of its own parameters is expected with {WHERE}")
    if layout.length:
        raise UserError(f"config.mesh={config.mesh!r}: with {WHERE} a mesh splits batches, not sequences")
    if not _has_layers(experiment.network):
        raise UserError(f"config.model.name={config.model['name']!r}: {WHERE} wants a classifier or a language model")


def _refuse_guide(config: Config, guide: Any, target: Any) -> None:
    where = f"{WHERE}.like" if config.run is None else f"{WHERE}.run={config.run!r}"
    if not _has_layers(guide):
        raise UserError(f"{where}: a {type(guide).__name__} cannot guide; take a classifier or a language model")
    sizes = [model.config.vocabulary_size for model in (guide, target)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{where}: its vocabulary has {sizes[0]} symbols, this task's has {sizes[1]}; take a guide of this task"
        )


def _has_layers(model: Any) -> bool:
    return isinstance(model, Classifier | LanguageModel)


def _plain(config: Config) -> dict[str, Any]:
    """What decides which network the guide is."""
    return json.loads(json.dumps({"run": config.run, "like": config.like}))  # as a checkpoint has it


def _first(of: Mapping[str, Any]) -> str:
    return f"run={of['run']!r}" if of["run"] is not None else "a model that was not trained"
