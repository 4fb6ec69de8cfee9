"""ListOps with LRA's parameters (Tay et al. 2021, arXiv 2011.04006), generated."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import listops
from experiments.data.preparation import ArrayRecordBuilder, show_progress


class Builder(ArrayRecordBuilder):
    """ListOps with LRA's parameters, sizes and order of splits (Tay et al. 2021); no expression appears twice.

    LRA's own files are one sample of the same distribution; these are another, identical on every machine (a test pins
    the random stream).

    Args (besides tensorflow-datasets' own, such as data_dir):
      sizes: examples per split, by default SIZES, whose keys it must have; to make a small data set.
      parameters: parameters of the generator, by default LRA's.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "LRA's parameters, seed 0."}
    SEED = 0
    SIZES: ClassVar[Mapping[str, int]] = {"train": 96_000, "validation": 2_000, "test": 2_000}

    def __init__(
        self,
        *,
        sizes: Mapping[str, int] | None = None,
        parameters: listops.ListOpsParameters = listops.ListOpsParameters(),
        **kwargs: Any,
    ):
        self.sizes = dict(sizes or self.SIZES)
        self.parameters = parameters
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="ListOps expressions in pre-order tokens: " + " ".join(listops.VOCABULARY),
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=listops.CLASSES),
                }
            ),
            homepage="https://arxiv.org/abs/2011.04006",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        # tensorflow-datasets runs these sequentially, in order; later splits skip the expressions in `seen`.
        seen: set[bytes] = set()
        return {name: self._generate_examples(name, seen) for name in self.sizes}

    def _generate_examples(self, split: str, seen: set[bytes]) -> Iterator[tuple[int, dict]]:
        number = list(self.SIZES).index(split)
        size = self.sizes[split]
        examples = listops.generate_split(self.parameters, self.SEED, number, size, seen, self.processes)
        for key, (tokens, value) in enumerate(show_progress(examples, size, f"{self.name} {split}")):
            yield key, {"tokens": np.array(tokens, np.uint8), "label": value}
