"""Induction with one trigger: in a random sequence it occurs once, and again at the end; the answer is the symbol that
followed it. Generated on read.

The induction heads of Olsson et al. (2022, arXiv 2209.11895) as a task of length extrapolation (Gu and Dao 2023, arXiv
2312.00752, section 4.1.2): one fact, at any distance.
"""

from dataclasses import dataclass

import numpy as np

from experiments.common.config import within
from experiments.tasks.base import MAX_DRAWN
from experiments.tasks.synthetic import SlotConfig, SlotTask, letter

TRIGGER, FIRST_SYMBOL = 1, 2  # 0 is padding


@dataclass(frozen=True)
class Config(SlotConfig):
    """`length` positions with symbols of an alphabet, the trigger at one of them and at the last."""

    length: int = 256
    alphabet: int = 16

    def __post_init__(self):
        super().__post_init__()
        within(self, 3, MAX_DRAWN, "length")
        within(self, 1, MAX_DRAWN, "alphabet")

    @property
    def vocabulary_size(self) -> int:
        return FIRST_SYMBOL + self.alphabet


class Task(SlotTask):
    baseline_name = "any one symbol"

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        super().__init__(config, chance=1 / config.alphabet, **batching)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        inputs = FIRST_SYMBOL + rng.integers(self.config.alphabet, size=self.config.length)
        place = rng.integers(self.config.length - 2)
        inputs[[place, -1]] = TRIGGER
        targets = np.zeros_like(inputs)
        targets[-1] = inputs[place + 1]
        return inputs, targets

    def symbol(self, number: int) -> str:
        """Letters are symbols, an exclamation mark is the trigger."""
        return "! " if number == TRIGGER else letter(number - FIRST_SYMBOL)
