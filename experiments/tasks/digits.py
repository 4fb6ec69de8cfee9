"""Handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, from scikit-learn), for experiments in seconds.

1,797 pictures: 1,397 for training, 200 for validation and 200 for testing, drawn with a fixed seed.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from experiments.common.errors import UserError
from experiments.tasks.base import ClassificationConfig, ClassificationTask

SPLITS = {"validation": slice(0, 200), "test": slice(200, 400), "train": slice(400, None)}


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """A picture is `length` elements of 64 / length numbers in [0, 1]: of all pixels, 8 rows, or 64 pixels. With
    `patches` they are squares, row by row: 4 of 4 x 4, 16 of 2 x 2, 64 pixels."""

    vocabulary_size: ClassVar[None] = None
    classes: ClassVar[int] = 10
    length: int = 1
    patches: bool = False

    def __post_init__(self):
        super().__post_init__()
        if 64 % self.length:
            raise ValueError(f"length={self.length}: must divide 64, the number of pixels")
        if self.patches and math.isqrt(self.length) ** 2 != self.length:
            raise ValueError(f"length={self.length}: must be 1, 4, 16 or 64, a number of squares, with patches=True")

    @property
    def channels(self) -> int:
        return 64 // self.length


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task. Reads no user files."""
        pictures, labels = read()
        sources = {
            split: list(zip(pictures[part], labels[part].tolist(), strict=True)) for split, part in SPLITS.items()
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: tuple[np.ndarray, int]) -> np.ndarray:
        picture = example[0]
        if self.config.patches:
            return squares(picture, math.isqrt(self.config.length))
        return picture.reshape(self.config.length, -1)

    def label(self, example: tuple[np.ndarray, int]) -> int:
        return example[1]


def squares(pictures: Float[np.ndarray, "*N 64"], count: int) -> Float[np.ndarray, "*N squares pixels"]:
    """`count` by `count` squares, row by row."""
    rows = pictures.reshape(*pictures.shape[:-1], count, 8 // count, count, 8 // count)
    return rows.swapaxes(-3, -2).reshape(*pictures.shape[:-1], count * count, -1)


def read() -> tuple[Any, Any]:
    """Pictures (1797, 64) float32 in [0, 1] and labels (1797,), in a fixed random order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.data[order] / 16).astype(np.float32), data.target[order]
