"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): key-value pairs, then each key once more; the
target of a key that is asked is its value. Generated on read.

The layout is that of the authors' code: all pairs come first. Behind them every second position may ask, at gaps from
the end of the pairs drawn by a power law, and what neither holds a pair nor asks is blank.
"""

from dataclasses import dataclass

import numpy as np

from experiments.common.config import within
from experiments.tasks.base import MAX_DRAWN
from experiments.tasks.synthetic import Example, SlotConfig, SlotTask

BLANK, FIRST_KEY = 1, 2  # 0 is padding


@dataclass(frozen=True)
class Config(SlotConfig):
    """`pairs` key-value pairs in `length` positions, from a `vocabulary` of which one half are keys, the other values.

    The k-th place that may ask has the weight k^(power - 1): with a `power` near 0 most questions come soon after the
    pairs, with 1 all places are alike. `random_fillers` puts random symbols in place of blanks, keys and values among
    them.
    """

    length: int = 64
    pairs: int = 4
    vocabulary: int = 128
    power: float = 0.01
    random_fillers: bool = False

    def __post_init__(self):
        super().__post_init__()
        within(self, 1, MAX_DRAWN, "length", "pairs", "vocabulary")
        if not 0 < self.power <= 1:
            raise ValueError(f"power={self.power}: must be above 0 and at most 1")
        if self.vocabulary < 2 * self.pairs:
            raise ValueError(f"vocabulary={self.vocabulary}: must be at least twice pairs={self.pairs}, all different")
        if self.length < 4 * self.pairs:
            raise ValueError(f"length={self.length}: must be at least 4 times pairs={self.pairs}")

    @property
    def vocabulary_size(self) -> int:
        return FIRST_KEY + 2 * self.half

    @property
    def half(self) -> int:
        return self.vocabulary // 2


class Task(SlotTask):
    baseline_name = "any one value"

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        super().__init__(config, chance=1 / config.half, **batching)

    def draw(self, rng: np.random.Generator) -> Example:
        config, count = self.config, self.config.pairs
        keys = FIRST_KEY + rng.choice(config.half, count, replace=False)
        values = FIRST_KEY + config.half + rng.choice(config.half, count, replace=False)
        weights = np.arange(1, (config.length - 2 * count) // 2 + 1) ** (config.power - 1)
        gaps = rng.choice(len(weights), count, replace=False, p=weights / weights.sum())
        asked = 2 * (count + gaps)
        if config.random_fillers:
            inputs = rng.integers(BLANK, config.vocabulary_size, size=config.length)
        else:
            inputs = np.full(config.length, BLANK)
        inputs[0 : 2 * count : 2], inputs[1 : 2 * count : 2], inputs[asked] = keys, values, keys
        targets = np.zeros(config.length, int)
        targets[asked] = values
        return inputs, targets

    def symbol(self, number: int) -> str:
        """k3 is a key, v5 a value, and a dot a blank."""
        index = number - FIRST_KEY
        key = f"k{index}" if index < self.config.half else f"v{index - self.config.half}"
        return f"{'·' if number == BLANK else key} "
