"""Selective copying: repeat, in order, the symbols scattered among blanks. Generated on read.

A variant of the task of Gu and Dao (2023, arXiv 2312.00752), small enough for studies of the router, with known
relevant elements.
"""

from dataclasses import dataclass

import numpy as np

from experiments.common.config import within
from experiments.tasks.base import MAX_DRAWN
from experiments.tasks.synthetic import SlotConfig, SlotTask, letter

BLANK, QUERY, FIRST_SYMBOL = 1, 2, 3  # 0 is padding


@dataclass(frozen=True)
class Config(SlotConfig):
    """`symbols` symbols of an alphabet among `length` positions."""

    length: int = 32
    symbols: int = 8
    alphabet: int = 16

    def __post_init__(self):
        super().__post_init__()
        within(self, 1, MAX_DRAWN, "length", "symbols", "alphabet")
        if self.length < self.symbols:
            raise ValueError(f"length={self.length}: must be at least symbols={self.symbols}")

    @property
    def vocabulary_size(self) -> int:
        return FIRST_SYMBOL + self.alphabet


class Task(SlotTask):
    baseline_name = "any one symbol"

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        super().__init__(config, chance=1 / config.alphabet, **batching)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        length, count, alphabet = self.config.length, self.config.symbols, self.config.alphabet
        symbols = FIRST_SYMBOL + rng.integers(alphabet, size=count)
        inputs = np.full(length + count, BLANK)
        inputs[np.sort(rng.choice(length, count, replace=False))] = symbols
        inputs[length:] = QUERY
        return inputs, np.concatenate([np.zeros(length, int), symbols])

    def symbol(self, number: int) -> str:
        """Letters are symbols, a dot is a blank, and a question mark a query."""
        return {BLANK: "· ", QUERY: "? "}.get(number) or letter(number - FIRST_SYMBOL)
