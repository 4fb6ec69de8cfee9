"""Short waves of known factors: amplitude, frequency, phase and offset, each of a few values, in every combination.

The factors are independent, and of every sequence they are known, so that a code for it can be scored
(`seqboat.interp.infomec`). Training draws from all sequences, and every split is each of them once: a score is of the
code, not of how it generalizes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from experiments.common.config import within
from experiments.data.sources import Batch
from experiments.tasks.base import MAX_DRAWN, ReconstructionTask

FACTORS = ("amplitude", "frequency", "phase", "offset")


@dataclass(frozen=True)
class Config:
    """Sequences of `length` numbers, factors of `values` values each."""

    vocabulary_size: ClassVar[None] = None
    target_width: ClassVar[None] = None
    length: int = 32
    values: int = 5

    def __post_init__(self):
        within(self, 2, 12, "values")
        within(self, 2 * self.values + 1, MAX_DRAWN // self.values ** len(FACTORS), "length")

    @property
    def width(self) -> int:
        """Of the vector that a sequence is for a model."""
        return self.length

    @property
    def channels(self) -> int:
        """Of the inputs, as `width`."""
        return self.length


class Task(ReconstructionTask):
    """A sequence is one row of its numbers: `inputs` and `targets` (B, 1, L). Batches also have `factors` (B, 1, 4)
    int32, the index of the value of each of FACTORS."""

    baseline_name = "the mean of the sequences"

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        super().__init__(**batching)
        self.config = config
        factors = combinations(config)
        x = waves(factors, config)
        # The same for all rows: terms of the loss then count by rows in every part of a batch.
        spread = np.full(len(x), x.var(0).sum())
        self._table: Batch = {"inputs": x, "targets": x, "spread": spread, "factors": factors}

    def train_batch(self, step: int) -> Batch:
        return self._drawn(self._table, step)

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        self._check(split)
        return self._in_order(self._table)

    def truth(self, batch: Mapping[str, Any]) -> dict[str, Int[np.ndarray, " B"]]:
        """The index of the value of every factor."""
        return dict(zip(FACTORS, np.asarray(batch["factors"])[:, 0].T, strict=True))


def combinations(config: Config) -> Int[np.ndarray, "N 4"]:
    """All, as indices of values."""
    grid = np.meshgrid(*[np.arange(config.values, dtype=np.int32)] * len(FACTORS), indexing="ij")
    return np.stack(grid, -1).reshape(-1, len(FACTORS))


def waves(factors: Int[np.ndarray, "N 4"], config: Config) -> Float[np.ndarray, "N L"]:
    """a sin(2 pi (f t / L + p)) + o:  a in 0.5..1.5, f = 1, 2, ... periods, p evenly over a turn, o in -1..1."""
    last = config.values - 1
    a, f, p, o = factors.T[:, :, None].astype(float)
    turns = (1 + f) * np.arange(config.length) / config.length + p / config.values
    return ((0.5 + a / last) * np.sin(2 * np.pi * turns) + 2 * o / last - 1).astype(np.float32)
