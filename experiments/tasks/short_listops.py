"""Short ListOps: expressions of 8 to 40 tokens, or 40 to 128, made in memory in seconds. Not a benchmark.

Like LRA's ListOps (Tay et al. 2021) with smaller trees, for the quickstart, or LRA's trees of fewer tokens. The splits
share no expression.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from experiments.common.config import at_most, within
from experiments.data import listops
from experiments.tasks.base import ClassificationTask
from seqboat.choices import check_choices

PARAMETERS = {
    # Lengths: 5 % below 9, median 18, 95 % below 34 tokens. Classes: 9 % to 12 % each. (20,000 expressions, seed 0.)
    "8-40": listops.ListOpsParameters(
        max_depth=4, max_arguments=5, operator_probability=0.3, min_length=7, max_length=41
    ),
    # Lengths: 5 % below 42, median 74, 95 % below 123 tokens. Classes: 5 % to 18 %. (500 expressions, seed 0.)
    "40-128": listops.ListOpsParameters(min_length=39, max_length=129),
}
# Beyond this, unused expressions become rare; it is far more than a quickstart needs.
MOST_EXAMPLES = 1_000_000


@dataclass(frozen=True)
class Config:
    """Numbers of examples, their least and most `tokens`, and the seed to generate them from; the order of training
    examples uses the run's seed."""

    vocabulary_size: ClassVar[int] = listops.VOCABULARY_SIZE
    classes: ClassVar[int] = listops.CLASSES
    train_examples: int = 40_000
    validation_examples: int = 2_000
    test_examples: int = 2_000
    data_seed: int = at_most(2**63 - 1, default=0)
    tokens: Literal["8-40", "40-128"] = "8-40"

    def __post_init__(self):
        check_choices(self)
        within(self, 1, MOST_EXAMPLES, "train_examples", "validation_examples", "test_examples")
        if self.data_seed < 0:
            raise ValueError(f"data_seed={self.data_seed}: must not be negative")

    @property
    def length(self) -> int:
        return PARAMETERS[self.tokens].max_length - 1


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task. Reads no file."""
        sizes = {
            "train": config.train_examples,
            "validation": config.validation_examples,
            "test": config.test_examples,
        }
        seen: set[bytes] = set()
        sources = {
            split: list(listops.generate_split(PARAMETERS[config.tokens], config.data_seed, number, size, seen))
            for number, (split, size) in enumerate(sizes.items())
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: listops.Example) -> np.ndarray:
        return np.array(example[0])

    def label(self, example: listops.Example) -> int:
        return example[1]

    def symbol(self, number: int) -> str:
        return f"{listops.VOCABULARY[number]} "
