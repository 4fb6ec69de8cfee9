"""Parity: at every element of a sequence of bits, whether the ones so far are odd. Generated on read.

A negative control (Grazzi et al. 2024, arXiv 2411.12537: linear recurrences need negative eigenvalues for it): a
positive moving average cannot keep a parity, so no arm should be right far beyond the lengths of training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.common.config import within
from experiments.tasks.base import MAX_DRAWN
from experiments.tasks.synthetic import Example, SlotConfig, SlotTask

ZERO, ONE = 1, 2  # 0 is padding


@dataclass(frozen=True)
class Config(SlotConfig):
    """`length` bits in training and validation, `test_length` in testing."""

    vocabulary_size = 3
    length: int = 40
    test_length: int = 256

    def __post_init__(self):
        super().__post_init__()
        within(self, 1, MAX_DRAWN, "length", "test_length")
        if self.test_length < self.length:
            raise ValueError(f"test_length={self.test_length}: must be at least length={self.length}")


class Task(SlotTask):
    baseline_name = "any one bit"
    slices = ("within_length", "beyond_length")

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        super().__init__(config, chance=1 / 2, **batching)

    def drawing(self, split: str) -> Callable[[np.random.Generator], Example]:
        length = self.config.test_length if split == "test" else self.config.length
        return lambda rng: _draw(rng, length)

    def row(self, example: Example) -> dict[str, Any]:
        beyond = np.arange(len(example[0])) >= self.config.length
        return super().row(example) | {"slices": beyond.astype(np.int32)}

    def train_row(self, example: Example) -> dict[str, Any]:
        return super().row(example)

    def symbol(self, number: int) -> str:
        return f"{number - ZERO} "


def _draw(rng: np.random.Generator, length: int) -> Example:
    bits = rng.integers(2, size=length)
    return ZERO + bits, ZERO + np.cumsum(bits) % 2
