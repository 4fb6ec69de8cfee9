"""Pathfinder and Path-X pictures (Linsley et al. 2018, arXiv 1805.08315) with the LRA's parameters, generated."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import pathfinder, pathfinder_board
from experiments.data.preparation import ArrayRecordBuilder, show_progress


@dataclass(eq=False)
class PathfinderConfig(tfds.core.BuilderConfig):
    """A size and difficulty. `preset` names its parameters in pathfinder.PRESETS."""

    preset: str = ""


class Builder(ArrayRecordBuilder):
    """Pathfinder (32x32) and Path-X (128x128) with the LRA's parameters and sizes (Tay et al. 2021, arXiv 2011.04006).

    LRA's own files are one sample of the same distribution; these are another, identical on every machine (a test pins
    the random stream).

    Args (besides tensorflow-datasets' own, such as data_dir):
      sizes: examples per split, by default SIZES, whose keys it must have. An example depends only on its split and
        index, so a small data set holds the first examples of the full one.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "LRA's parameters, seed 0."}
    BUILDER_CONFIGS: ClassVar[list[PathfinderConfig]] = [
        PathfinderConfig(name=name, preset=name) for name in pathfinder.PRESETS
    ]
    SEED = 0
    SIZES: ClassVar[Mapping[str, int]] = {"train": 160_000, "validation": 20_000, "test": 20_000}

    def __init__(self, *, sizes: Mapping[str, int] | None = None, **kwargs: Any):
        self.sizes = dict(sizes or self.SIZES)
        super().__init__(**kwargs)

    @property
    def parameters(self) -> pathfinder.PathfinderParameters:
        return pathfinder.PRESETS[self.builder_config.preset]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.parameters.size
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Do the two discs mark the ends of one dashed path (1) or of two (0)? {self.parameters}",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(size, size), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=pathfinder.CLASSES),
                }
            ),
            homepage="https://arxiv.org/abs/1805.08315",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        pathfinder_board.opencv()  # fail on a missing package before anything is written
        return {name: self._generate_examples(name) for name in self.sizes}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        number = list(self.SIZES).index(split)
        size = self.sizes[split]
        examples = pathfinder.generate_split(self.parameters, self.SEED, number, size, self.processes)
        title = f"{self.name}/{self.builder_config.name} {split}"
        for key, example in enumerate(show_progress(examples, size, title)):
            yield key, {"image": example.image, "label": example.label}
