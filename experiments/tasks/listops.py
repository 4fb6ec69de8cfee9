"""ListOps of the Long Range Arena (Tay et al. 2021): the value 0-9 of a nested expression of 501 to 1999 tokens.

Reads the data set that `python -m experiments.prepare --dataset=listops` writes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.data import listops
from experiments.data.sources import open_split
from experiments.tasks.base import ClassificationConfig, ClassificationTask


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """`dataset` is a prepared data set: None for the full one, or a part (listops/0.125). `length` is in tokens of the
    padded input; longer expressions are cut, but none is at LRA's 2000."""

    vocabulary_size = listops.VOCABULARY_SIZE
    classes = listops.CLASSES
    dataset: str | None = None
    length: int = 2000


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        sources = {
            split: open_split(config.dataset or "listops", split, data_dir, ("tokens", "label"))
            for split in ("train", *self.splits)
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: dict[str, Any]) -> np.ndarray:
        return example["tokens"]

    def symbol(self, number: int) -> str:
        return f"{listops.VOCABULARY[number]} "
