"""Image of the Long Range Arena (Tay et al. 2021): CIFAR-10 (Krizhevsky 2009) in gray, pixel by pixel, row by row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.data.sources import Source, Subset, open_split
from experiments.tasks.base import ClassificationTask
from experiments.tasks.features import PixelConfig, pixels

SIZE = 32
FEATURES = ("image", "label")
TRAIN_SHARE = 0.9  # of the training pictures in prepared order, as in LRA; the rest is for validation


@dataclass(frozen=True)
class Config(PixelConfig):
    """Inputs are (gray / 255 - mean) / std."""

    classes = 10
    length = SIZE * SIZE
    mean: float = 0.48
    std: float = 0.24


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        labelled = open_split("cifar10", "train", data_dir, FEATURES)
        cut = round(TRAIN_SHARE * len(labelled))
        sources: dict[str, Source] = {
            "train": Subset(labelled, range(cut)),
            "validation": Subset(labelled, range(cut, len(labelled))),
            "test": open_split("cifar10", "test", data_dir, FEATURES),
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: dict[str, Any]) -> np.ndarray:
        return pixels(gray(example["image"]), self.config)


def gray(image: Int[np.ndarray, "R R 3"]) -> Float[np.ndarray, "R R"]:
    """0..255 as in LRA's files, made with TensorFlow: (.2989 R + .587 G + .114 B) / 255 in float32, times 255.5,
    truncated.

    PIL's and torchvision's conversions differ by 1 on a quarter of the pixels.
    """
    share = (image.astype(np.float32) / np.float32(255)) @ np.array([0.2989, 0.587, 0.114], np.float32)
    return np.trunc(share * np.float32(255.5))
