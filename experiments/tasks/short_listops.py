"""Short ListOps: expressions of 8 to 40 tokens, made in memory in seconds. For the quickstart; not a benchmark.

Like LRA's ListOps (Tay et al. 2021) with smaller trees. The splits share no expression.
"""

from dataclasses import dataclass

import numpy as np

from experiments.data import listops
from experiments.tasks.base import ClassificationTask, require

LENGTH = 40
# Lengths: 5 % below 9, median 18, 95 % below 34 tokens. Classes: 9 % to 12 % each. (20,000 expressions, seed 0.)
PARAMETERS = listops.ListOpsParameters(
    max_depth=4, max_arguments=5, operator_probability=0.3, min_length=7, max_length=LENGTH + 1
)
# Beyond this, expressions that are not yet taken become rare; it is far more than a quickstart needs.
MOST_EXAMPLES = 1_000_000


@dataclass(frozen=True)
class Config:
    """How many examples to make, and from which seed; the order of training examples has the run's own seed."""

    train_examples: int = 40_000
    validation_examples: int = 2_000
    test_examples: int = 2_000
    data_seed: int = 0


class Task(ClassificationTask):
    vocabulary_size = listops.VOCABULARY_SIZE
    classes = listops.CLASSES

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in ClassificationTask. Reads no file."""
        sizes = {
            "train": config.train_examples,
            "validation": config.validation_examples,
            "test": config.test_examples,
        }
        for split, size in sizes.items():
            message = f"config.task.{split}_examples is {size}; it must be in 1..{MOST_EXAMPLES}"
            require(1 <= size <= MOST_EXAMPLES, message)
        require(config.data_seed >= 0, f"config.task.data_seed is {config.data_seed}; it must not be negative")
        seen: set[bytes] = set()
        sources = {
            split: list(listops.generate_split(PARAMETERS, config.data_seed, number, size, seen))
            for number, (split, size) in enumerate(sizes.items())
        }
        super().__init__(sources, LENGTH, **batching)

    def encode(self, example: listops.Example) -> tuple[np.ndarray, int]:
        tokens, value = example
        return np.array(tokens), value
