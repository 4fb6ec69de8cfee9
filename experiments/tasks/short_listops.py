"""Short ListOps: expressions of 8 to 40 tokens, made in memory in seconds. For the quickstart; not a benchmark.

Like LRA's ListOps (Tay et al. 2021) with smaller trees. The splits share no expression.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.common.config import at_most, within
from experiments.data import listops
from experiments.tasks.base import ClassificationTask

LENGTH = 40
# Lengths: 5 % below 9, median 18, 95 % below 34 tokens. Classes: 9 % to 12 % each. (20,000 expressions, seed 0.)
PARAMETERS = listops.ListOpsParameters(
    max_depth=4, max_arguments=5, operator_probability=0.3, min_length=7, max_length=LENGTH + 1
)
# Beyond this, unused expressions become rare; it is far more than a quickstart needs.
MOST_EXAMPLES = 1_000_000


@dataclass(frozen=True)
class Config:
    """Numbers of examples and the seed to generate them from; the order of training examples uses the run's seed."""

    vocabulary_size: ClassVar[int] = listops.VOCABULARY_SIZE
    classes: ClassVar[int] = listops.CLASSES
    length: ClassVar[int] = LENGTH
    train_examples: int = 40_000
    validation_examples: int = 2_000
    test_examples: int = 2_000
    data_seed: int = at_most(2**63 - 1, default=0)

    def __post_init__(self):
        within(self, 1, MOST_EXAMPLES, "train_examples", "validation_examples", "test_examples")
        if self.data_seed < 0:
            raise ValueError(f"data_seed={self.data_seed}: must not be negative")


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
            split: list(listops.generate_split(PARAMETERS, config.data_seed, number, size, seen))
            for number, (split, size) in enumerate(sizes.items())
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: listops.Example) -> np.ndarray:
        return np.array(example[0])

    def label(self, example: listops.Example) -> int:
        return example[1]

    def symbol(self, number: int) -> str:
        return f"{listops.VOCABULARY[number]} "
