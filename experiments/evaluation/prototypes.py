"""Cases of a classifier with the head "prototypes": the training examples that are nearest to its prototypes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.common.errors import UserError
from experiments.evaluation.examples import is_example
from experiments.training.restore import Run
from seqboat.models.heads import prototypes

# Training examples that are looked at, unless the caller says how many.
EXAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """The training example nearest to a prototype: its `number` from 0, its class `target`, the squared `distance`, and
    its row of a batch. `vote` is the class whose logit the prototype raises most, relative to the others, for sequences
    near it: argmin over classes of its row of W."""

    vote: int
    number: int
    target: int
    distance: float
    example: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Cases:
    """A case for every prototype, found among `looked` of the `total` training examples. `variance` is that of their z,
    the mean squared distance to the mean."""

    cases: tuple[Case, ...]
    looked: int
    total: int
    variance: float

    @property
    def closeness(self) -> float:
        """The mean over prototypes of the squared distance to the nearest example, over the variance: 0 if every
        prototype is an example, about 1 if they are no nearer than the mean is."""
        return float(np.mean([case.distance for case in self.cases]) / self.variance)

    @property
    def agreement(self) -> float:
        """The share of prototypes that vote for the class of their nearest example."""
        return float(np.mean([case.vote == case.target for case in self.cases]))


def cases(run: Run, most: int = EXAMPLES) -> Cases:
    """Looks at up to `most` evenly spaced training examples. Raises UserError for a run without this head."""
    if not isinstance(getattr(run.model.config, "head", None), prototypes.Config):
        raise UserError(f"{run.origin} has no prototypes: train a classifier with config.model.head.name='prototypes'")
    numbers, batches = run.task.train_examples(most)
    count, seen = run.model.config.head.count, 0
    nearest: list[tuple[float, int, Mapping[str, np.ndarray]]] = [(np.inf, -1, {})] * count
    parts: list[np.ndarray] = []
    for batch in batches:
        z, distances = jax.device_get(look(run.model, run.variables, batch["inputs"], batch["lengths"]))
        real = is_example(batch)  # the first rows
        there = real & (batch["lengths"] > 0)
        parts.append(z[there])
        distances = np.where(there[:, None], distances, np.inf)
        for j, row in enumerate(distances.argmin(0)):
            if distances[row, j] < nearest[j][0]:
                example = {name: np.array(array[row]) for name, array in batch.items()}
                nearest[j] = float(distances[row, j]), int(numbers[seen + row]), example
        seen += real.sum()
    z = np.concatenate(parts).astype(np.float64)
    votes = np.asarray(run.variables["params"]["head"]["votes"]).argmin(1)
    return Cases(
        tuple(
            Case(vote, number, int(example["targets"]), distance, example)
            for vote, (distance, number, example) in zip(votes.tolist(), nearest, strict=True)
        ),
        looked=len(numbers),
        total=run.task.train_size,
        variance=float(np.square(z - z.mean(0)).sum(1).mean()),
    )


@functools.partial(jax.jit, static_argnums=0)
def look(
    model: nn.Module, variables: Any, inputs: Array, lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B K"], Float[Array, "B P"]]:
    """z of a batch, and its squared distances to the prototypes."""
    taps = model.apply(variables, inputs, lengths, mutable=["taps"])[1]["taps"]["head"]
    return taps["z"], taps["prototype_distances"]
