"""Tokens of a large codebook with clusters, from a source whose entropy is known. Generated on read.

A sequence is a walk through clusters, of `edges` successors each, all equally likely, and in every cluster on its way
one of `choices` codes, equally likely, of the `fine` that the cluster has. Which codes these are depends on the cluster
and on the edge of the walk to its neighbour, the next or the previous cluster. Every sequence of n codes that can occur
has the same probability,

    -log2 p = log2 coarse + (n - 1) log2 edges + n log2 choices,

since the codes tell the walk and every choice. It is a source for `seqboat.models.coarse_to_fine`; with the neighbour
"next", a model of one stage must guess the next cluster before it can tell a code.

Successors and choices are drawn from the seed of the data.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.common.config import within
from experiments.tasks.base import MAX_DRAWN, Logits, Scalar, Sums
from experiments.tasks.synthetic import SlotConfig, SlotTask
from experiments.tasks.tokfsm import random_successors
from seqboat.choices import check_choices
from seqboat.ops.clusters import Clusters, log_softmax_within
from seqboat.ops.losses import cross_entropy

BEGIN, FIRST_CODE = 1, 2  # 0 is padding
MAX_CODES = 2**16
_TABLES, _SHUFFLE = 3, 4  # of the seed: the splits have 0, 1, 2


@dataclass(frozen=True)
class Config(SlotConfig):
    """`length` symbols, the first of which is `begin`, the begin symbol; `coarse` clusters of `fine` codes.

    `shuffled` gives models clusters of the same sizes, of codes drawn at random: a control.
    """

    begin: ClassVar[int] = BEGIN
    length: int = 32
    coarse: int = 32
    fine: int = 32
    edges: int = 4
    choices: int = 4
    neighbour: Literal["next", "previous"] = "next"
    shuffled: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        within(self, 2, MAX_DRAWN, "length")
        within(self, 2, MAX_CODES, "coarse")
        within(self, 1, MAX_CODES // self.coarse, "fine")
        within(self, 1, self.coarse, "edges")
        within(self, 1, self.fine, "choices")

    @property
    def vocabulary_size(self) -> int:
        return FIRST_CODE + self.coarse * self.fine

    @functools.cached_property
    def clusters(self) -> Clusters:
        """The cluster of every symbol, as models are given them: padding and the begin symbol have one of their own."""
        groups = np.arange(self.coarse).repeat(self.fine)
        if self.shuffled:
            groups = np.random.default_rng((self.data_seed, _SHUFFLE)).permutation(groups)
        return (0,) * FIRST_CODE + tuple((groups + 1).tolist())

    @property
    def entropy(self) -> float:
        """Of a code, in bits."""
        count = self.length - 1
        walk = math.log2(self.coarse) + (count - 1) * math.log2(self.edges)
        return walk / count + math.log2(self.choices)


class CodesTask(SlotTask):
    """Inputs (B, L) are the begin symbol and the codes, targets the codes and a 0 that has no weight. So a model that
    looks ahead sees its targets: it takes a causal one, or one whose logits are an exact likelihood all the same.

    Metrics: `bits_per_token`, the mean of -log2 p; and in evaluations its parts, `bits_coarse` of the cluster of a code
    and `bits_fine` of a code in its cluster.
    """

    selection_metric = "bits_per_token"
    higher_is_better = False
    baseline_name = "the frequencies of codes"

    def __init__(self, config: Any, **batching: int):
        super().__init__(config, chance=float("nan"), **batching)

    def loss(self, output: Logits, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        """No accuracy: a model of two stages has seen the cluster of a target when it scores the codes in it."""
        total, weight, metrics = super().loss(output, batch)
        return total, weight, {"loss": metrics["loss"], "bits_per_token": (total / math.log(2), weight)}

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        weights, targets = batch["weights"], batch["targets"]
        within_cluster = log_softmax_within(output.logits, self.config.clusters)
        fine = -jnp.take_along_axis(within_cluster, targets[..., None], axis=-1)[..., 0] / math.log(2)
        coarse = cross_entropy(output.logits, targets) / math.log(2) - fine
        parts = {"bits_coarse": coarse, "bits_fine": fine}
        return {name: (jnp.sum(weights * part), jnp.sum(weights)) for name, part in parts.items()}

    def baseline(self, split: str) -> dict[str, float]:
        """The entropy of the frequencies of codes in the split."""
        source = self._evaluation_source(split)
        counts = np.bincount(np.concatenate([source[index][0][1:] for index in range(len(source))]))
        share = counts[counts > 0] / counts.sum()
        return {"bits_per_token": float(-(share * np.log2(share)).sum())}


class Task(CodesTask):
    """In evaluations also `excess`, the bits above the entropy of the source."""

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        self.successors, self.choices = tables(config)
        super().__init__(config, **batching)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        config, count = self.config, self.config.length - 1
        taken = rng.integers(config.edges, size=count - 1)
        walk = [int(rng.integers(config.coarse))]
        for edge in taken.tolist():
            walk.append(int(self.successors[walk[-1], edge]))
        at_end = [config.edges]
        context = np.concatenate([taken, at_end] if config.neighbour == "next" else [at_end, taken])
        fine = self.choices[walk, context, rng.integers(config.choices, size=count)]
        return example(FIRST_CODE + np.array(walk) * config.fine + fine)

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        parts = super().evaluation_metrics(output, batch)
        (coarse, weight), (fine, _) = parts["bits_coarse"], parts["bits_fine"]
        return {**parts, "excess": (coarse + fine - weight * self.config.entropy, weight)}

    def symbol(self, number: int) -> str:
        """A code is CLUSTER.CODE, the begin symbol an arrow."""
        if number < FIRST_CODE:
            return "→ " if number == BEGIN else "∅ "
        return "{}.{} ".format(*divmod(number - FIRST_CODE, self.config.fine))


def example(codes: Int[np.ndarray, "L-1"]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (L,)."""
    return np.concatenate([[BEGIN], codes]), np.concatenate([codes, [0]])


def tables(config: Config) -> tuple[Int[np.ndarray, "K edges"], Int[np.ndarray, "K contexts choices"]]:
    """The successors of every cluster, and which codes of it may be where: a context is an edge to the next cluster, or
    from the previous one, and the last one is of the walk's end, or of its beginning."""
    rng = np.random.default_rng((config.data_seed, _TABLES))
    successors = random_successors(rng, config.coarse, config.edges)
    own = [rng.choice(config.fine, config.choices, replace=False) for _ in range(config.coarse * (config.edges + 1))]
    return successors, np.array(own).reshape(config.coarse, config.edges + 1, config.choices)
