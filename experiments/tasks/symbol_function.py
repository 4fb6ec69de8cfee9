"""A function of sequences of symbols (`seqboat.interp.functions.symbols`): its input, then a slot for every answer.
Generated on read.

A model that learns one is a black box whose truth is known, up to its mistakes (FIND, Schwettmann et al. 2023, arXiv
2309.03886).
"""

from dataclasses import dataclass

import numpy as np

from experiments.tasks.synthetic import Example, SlotConfig, SlotTask
from seqboat.interp.functions.symbols import LENGTH, SEQUENCES, SymbolFunction, inputs

QUERY, FIRST_SYMBOL = 1, 2  # 0 is padding
FIRST_ANSWER = 2  # of the answer 0; the one before means that the sequence has ended
DRAWN = 4096  # inputs to estimate the share of the most common answer from


@dataclass(frozen=True)
class Config(SlotConfig):
    """A `template` of SEQUENCES with its `numbers`: reverse, shift, dedupe, count, or two, as "shift then reverse"."""

    length = 2 * LENGTH
    template: str = "reverse"
    numbers: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _ = self.function

    @property
    def function(self) -> SymbolFunction:
        return SymbolFunction(self.data_seed, SEQUENCES, self.template, self.numbers)

    @property
    def vocabulary_size(self) -> int:
        """The largest answer is a count of all elements."""
        return FIRST_ANSWER + LENGTH + 1


class Task(SlotTask):
    baseline_name = "the most common answer"

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        answers = FIRST_ANSWER + config.function.values(inputs(DRAWN, np.random.default_rng(config.data_seed)))
        super().__init__(config, chance=float(np.bincount(answers.ravel()).max() / answers.size), **batching)

    def draw(self, rng: np.random.Generator) -> Example:
        x = inputs(1, rng)
        (answers,) = self.config.function.values(x)
        return ask(x)[0], np.concatenate([np.zeros(LENGTH, int), FIRST_ANSWER + answers])

    def symbol(self, number: int) -> str:
        return "? " if number == QUERY else f"{number - FIRST_SYMBOL} "


def ask(x: np.ndarray) -> np.ndarray:
    """The ids (N, 2 LENGTH) that ask for the answers to x (N, LENGTH)."""
    return np.concatenate([FIRST_SYMBOL + x, np.full_like(x, QUERY)], axis=1)
