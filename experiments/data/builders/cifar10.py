"""CIFAR-10 (Krizhevsky 2009) from its binary version."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.common.errors import UserError
from experiments.data.archives import read_files
from experiments.data.preparation import ArrayRecordBuilder, SourceFile, check_count, find_source, show_progress

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SOURCES = (
    SourceFile("cifar-10-binary.tar.gz", URL, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    SourceFile("cifar-10-batches-bin", URL),
)
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (32, 32, 3)
RECORD_BYTES = 1 + 32 * 32 * 3  # the label, then the red, the green and the blue plane
RECORDS_PER_FILE = 10_000


class Builder(ArrayRecordBuilder):
    """The same examples, ids and order as tensorflow-datasets' own, with pixels stored raw instead of as PNG.

    Built by one process, in seconds.
    """

    VERSION = tfds.core.Version("3.0.2")
    FILES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test": ("test_batch.bin",),
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="60,000 colour images of 32x32 pixels in 10 classes.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Tensor(shape=SHAPE, dtype=np.uint8, encoding="bytes"),
                    "label": tfds.features.ClassLabel(names=LABELS),
                }
            ),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        _, path = find_source(self, SOURCES)
        return {split: self._generate_examples(path, split) for split in self.FILES}

    def _generate_examples(self, path: Path, split: str) -> Iterator[tuple[int, dict]]:
        total = RECORDS_PER_FILE * len(self.FILES[split])
        found = 0
        for index, label, image in show_progress(self._records(path, split), total, f"{self.name} {split}"):
            found += 1
            yield index, {"id": f"{split}_{index:05d}", "image": image, "label": label}
        check_count(path, found, total, f"{split} images")

    def _records(self, path: Path, split: str) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields index in the split, label and pixels of every image."""
        files = self.FILES[split]
        for member, contents in read_files(path, lambda name: PurePosixPath(name).name in files):
            if len(contents) != RECORDS_PER_FILE * RECORD_BYTES:
                raise UserError(
                    f"{path}: {member} is cut short or damaged: it has {len(contents):,} bytes instead of "
                    f"{RECORDS_PER_FILE * RECORD_BYTES:,}"
                )
            first = files.index(PurePosixPath(member).name) * RECORDS_PER_FILE
            for row, record in enumerate(np.frombuffer(contents, np.uint8).reshape(-1, RECORD_BYTES)):
                if record[0] >= len(LABELS):
                    raise UserError(f"{path}: {member}, image {row} has the label {record[0]}; the last is 9")
                yield first + row, int(record[0]), record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
