"""Handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, from scikit-learn), for experiments in seconds.

1,797 pictures: 1,397 for training, 200 for validation and 200 for testing, drawn with a fixed seed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from experiments.common.errors import UserError
from experiments.tasks.base import ClassificationConfig, ClassificationTask

SPLITS = {"validation": slice(0, 200), "test": slice(200, 400), "train": slice(400, None)}


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """A picture is one element of 64 numbers in [0, 1]."""

    vocabulary_size: ClassVar[None] = None
    channels: ClassVar[int] = 64
    classes: ClassVar[int] = 10
    length: int = 1


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task. Reads no user files."""
        pictures, labels = read()
        sources = {
            split: list(zip(pictures[part], labels[part].tolist(), strict=True)) for split, part in SPLITS.items()
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: tuple[np.ndarray, int]) -> np.ndarray:
        return example[0][None]

    def label(self, example: tuple[np.ndarray, int]) -> int:
        return example[1]


def read() -> tuple[Any, Any]:
    """Pictures (1797, 64) float32 in [0, 1] and labels (1797,), in a fixed random order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.data[order] / 16).astype(np.float32), data.target[order]
