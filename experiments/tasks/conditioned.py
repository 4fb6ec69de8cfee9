"""Conditions of hypernetworks: hyper-inputs drawn for batches of any task.

    penalty     lambda in [0, 1]: multiplies `config.train.activation_penalty`, so that one model learns every trade-off
                between accuracy and attention
    rotation    pictures rotated by 90 z degrees: one network for all orientations
    noise       M uninformative random numbers: a distribution over networks (Bayesian hypernetworks)

A training batch has one hyper-input, a function of (seed, step); an evaluation iterates over fixed ones.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from experiments.common.errors import UserError
from experiments.data.sources import Batch
from seqboat.hyper.heads import HyperConfig

# Folded into the seed, so that hyper-inputs are independent of the order of examples.
CONDITIONS = 1_000_003


@dataclasses.dataclass(frozen=True)
class HyperOptions:
    """`config.hypernetwork`: a hypernetwork generates the parameters matched by globs in `select` and not in `exclude`.

    `evaluations` is the number of hyper-inputs that an evaluation averages over: evenly spaced if hyper-inputs are one
    number, else fixed and random. `at` evaluates at this one instead.
    """

    condition: Literal["penalty", "rotation", "noise"]
    select: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()
    evaluations: int = 5
    at: tuple[float, ...] | None = None
    network: HyperConfig = dataclasses.field(default_factory=HyperConfig)

    def __post_init__(self):
        inputs = self.network.encoding.inputs
        if self.evaluations < 1:
            raise ValueError(f"evaluations={self.evaluations}: must be at least 1")
        if self.network.encoding.kind == "embedding":
            raise ValueError("network.encoding.kind='embedding': these conditions are real numbers; use cos_sin")
        if self.condition != "noise" and inputs != 1:
            raise ValueError(f"condition={self.condition!r} is one number: network.encoding.inputs={inputs} must be 1")
        low, high = self.network.encoding.low, self.network.encoding.high
        if self.condition != "noise" and (low, high) != (0.0, 1.0):
            raise ValueError(f"condition={self.condition!r} is in 0..1: so must network.encoding be, not {low}..{high}")
        if self.at is not None and (len(self.at) != inputs or not all(low <= z <= high for z in self.at)):
            raise ValueError(f"at={self.at}: must be {inputs} numbers in {low}..{high}")


class Conditioned:
    """A task whose batches have a hyper-input `condition` (B, M), with equal rows, and the changes it implies."""

    def __init__(self, task: Any, options: HyperOptions, seed: int):
        self.task, self._options, self._seed = task, options, seed
        if options.condition == "rotation" and (picture := task.train_batch(0)["inputs"]).shape[1:] != (1, 64):
            raise UserError(
                f"config.hypernetwork.condition='rotation': needs pictures of 8 x 8, not inputs {picture.shape[1:]}"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def example(self) -> Batch:
        return self.at(self.task.example(), self._drawn(0))

    def train_batch(self, step: int) -> Batch:
        return self.at(self.task.train_batch(step), self._drawn(step))

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.task.train_batches(start_step), start_step):
            yield self.at(batch, self._drawn(step))

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yields every example of the split, once per hyper-input of the evaluation."""
        for condition in self.evaluated():
            for batch in self.task.evaluation_batches(split):
                yield self.at(batch, condition)

    def evaluated(self) -> np.ndarray:
        """The hyper-inputs of an evaluation, (K, M)."""
        options, encoding = self._options, self._options.network.encoding
        if options.at is not None:
            return np.array([options.at], np.float32)
        if encoding.inputs > 1:
            rng = np.random.default_rng(CONDITIONS)
            return rng.uniform(encoding.low, encoding.high, (options.evaluations, encoding.inputs)).astype(np.float32)
        if options.evaluations == 1:
            return np.array([[(encoding.low + encoding.high) / 2]], np.float32)
        return np.linspace(encoding.low, encoding.high, options.evaluations, dtype=np.float32)[:, None]

    def _drawn(self, step: int) -> np.ndarray:
        encoding = self._options.network.encoding
        rng = np.random.default_rng((CONDITIONS, self._seed, step))
        return rng.uniform(encoding.low, encoding.high, encoding.inputs).astype(np.float32)

    def at(self, batch: Batch, condition: np.ndarray) -> Batch:
        """A batch of the task, at a hyper-input."""
        count = len(batch["inputs"])
        batch = {**batch, "condition": np.broadcast_to(condition, (count, len(condition)))}
        if self._options.condition == "penalty":
            batch["penalty"] = batch["condition"][:, 0]
        if self._options.condition == "rotation":
            turned = batch["inputs"].reshape(count, 64) @ rotation(90 * float(condition[0]), 8).T
            batch["inputs"] = turned.reshape(count, 1, 64).astype(np.float32)
        return batch


def rotation(degrees: float, size: int) -> np.ndarray:
    """The matrix (size^2, size^2) that rotates flattened square pictures about their centre, with bilinear weights."""
    angle, middle = np.deg2rad(degrees), (size - 1) / 2
    row, column = np.divmod(np.arange(size * size), size)
    y, x = row - middle, column - middle
    source = np.stack([np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x]) + middle
    first = np.floor(source + 1e-9).astype(int)
    rest = source - first
    matrix = np.zeros((size * size, size * size))
    for down in (0, 1):
        for right in (0, 1):
            at = first + np.array([[down], [right]])
            weight = np.prod(np.where([[down], [right]], rest, 1 - rest), 0)
            inside = np.all((at >= 0) & (at < size), 0)
            target = np.flatnonzero(inside)
            matrix[target, at[0, inside] * size + at[1, inside]] += weight[inside]
    return matrix
