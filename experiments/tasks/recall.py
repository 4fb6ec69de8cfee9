"""Associative recall: key-value pairs scattered among blanks, then the keys in another order. Generated on read.

A variant of multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): the target of a queried key is the
value that followed it.
"""

from dataclasses import dataclass

import numpy as np

from experiments.common.config import within
from experiments.tasks.base import MAX_DRAWN
from experiments.tasks.synthetic import SlotConfig, SlotTask

BLANK, FIRST_KEY = 1, 2  # 0 is padding


@dataclass(frozen=True)
class Config(SlotConfig):
    """`pairs` key-value pairs, from `keys` keys and `values` values, among `length` positions."""

    length: int = 48
    pairs: int = 8
    keys: int = 16
    values: int = 16

    def __post_init__(self):
        super().__post_init__()
        within(self, 1, MAX_DRAWN, "length", "pairs", "keys", "values")
        if self.keys < self.pairs:
            raise ValueError(f"keys={self.keys}: must be at least pairs={self.pairs}, since no key is used twice")
        if self.length < 2 * self.pairs:
            raise ValueError(f"length={self.length}: must be at least twice pairs={self.pairs}")

    @property
    def vocabulary_size(self) -> int:
        return FIRST_KEY + self.keys + self.values


class Task(SlotTask):
    baseline_name = "any one value"

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        super().__init__(config, chance=1 / config.values, **batching)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        length, count = self.config.length, self.config.pairs
        gaps = np.sort(rng.choice(length - count, count, replace=False))
        places = gaps + np.arange(count)  # non-overlapping pairs of neighbours
        keys = FIRST_KEY + rng.permutation(self.config.keys)[:count]
        values = FIRST_KEY + self.config.keys + rng.integers(self.config.values, size=count)
        order = rng.permutation(count)
        inputs = np.full(length + count, BLANK)
        inputs[places], inputs[places + 1], inputs[length:] = keys, values, keys[order]
        return inputs, values[order]

    def symbol(self, number: int) -> str:
        """k3 is a key, v5 a value, and a dot a blank."""
        index = number - FIRST_KEY
        key = f"k{index}" if index < self.config.keys else f"v{index - self.config.keys}"
        return f"{'·' if number == BLANK else key} "
