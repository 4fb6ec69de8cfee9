"""Free Spoken Digit Dataset, release 1.0.9 (Jackson 2016)."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import tensorflow_datasets as tfds

from experiments.common.errors import UserError
from experiments.data.archives import read_files, read_wav
from experiments.data.preparation import ArrayRecordBuilder, SourceFile, check_count, find_source, show_progress

HOMEPAGE = "https://github.com/Jakobovski/free-spoken-digit-dataset"
URL = f"{HOMEPAGE}/archive/v1.0.9.tar.gz"
SHA256 = "8bc44cde129d505cbbb6b365c09f80c663f2aa77578afc634e6141a2f87100c0"
SOURCES = (
    SourceFile("free-spoken-digit-dataset-1.0.9.tar.gz", URL, SHA256),
    SourceFile("v1.0.9.tar.gz", URL, SHA256),  # the last part of the URL
    SourceFile("free-spoken-digit-dataset-1.0.9", URL),
)
RATE = 8000  # Hz


class Builder(ArrayRecordBuilder):
    """The same examples as tensorflow-datasets' own; `audio` holds the values of 16-bit samples at 8 kHz.

    Built by one process, in seconds.
    """

    VERSION = tfds.core.Version("1.0.9")
    EXPECTED = 2500

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Spoken English digits, mono, 8 kHz: 5 speakers, 50 recordings of each digit.",
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int64),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "audio/filename": tfds.features.Text(),
                }
            ),
            homepage=HOMEPAGE,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict]]]:
        _, path = find_source(self, SOURCES)
        return {"train": self._generate_examples(path)}

    def _generate_examples(self, path: Path) -> Iterator[tuple[str, dict]]:
        files = read_files(path, lambda name: re.search(r"(^|/)recordings/[^/]+\.wav$", name) is not None)
        found = 0
        for member, contents in show_progress(files, self.EXPECTED, f"{self.name} train"):
            name = PurePosixPath(member)
            if not re.match(r"\d_", name.name):
                raise UserError(f"{path}: {member} is not named DIGIT_SPEAKER_INDEX.wav")
            found += 1
            audio = read_wav(f"{path}: {member}", contents, RATE).astype(np.int64)
            yield name.stem, {"audio": audio, "label": int(name.name[0]), "audio/filename": name.name}
        check_count(path, found, self.EXPECTED, "recordings")
