"""Pathfinder and Path-X of the Long Range Arena (Linsley et al. 2018, Tay et al. 2021): are two dots on one path?

Reads what `python -m experiments.prepare --dataset=pathfinder/32_hard` writes, pixel by pixel, row by row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.common.errors import require
from experiments.data.sources import open_split
from experiments.tasks.base import ClassificationTask
from experiments.tasks.features import PixelConfig, pixels

FEATURES = ("image", "label")


@dataclass(frozen=True)
class Config(PixelConfig):
    """`dataset` is a prepared data set of pictures of `resolution` x `resolution`. Inputs are (gray / 255 - mean) /
    std."""

    classes = 2
    dataset: str = "pathfinder/32_hard"
    resolution: int = 32
    mean: float = 0.5
    std: float = 0.5

    @property
    def length(self) -> int:
        return self.resolution**2


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        sources = {split: open_split(config.dataset, split, data_dir, FEATURES) for split in ("train", *self.splits)}
        found, wanted = sources["train"][0]["image"].shape, (config.resolution, config.resolution)
        shape = " x ".join(map(str, found))
        require(
            found == wanted, f"config.task.resolution={config.resolution}: pictures of {config.dataset} are {shape}"
        )
        super().__init__(config, sources, **batching)

    def encode(self, example: dict[str, Any]) -> np.ndarray:
        return pixels(example["image"], self.config)
