"""Text as bytes, in order, in blocks of one size: the base of the language-modelling data sets."""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import numpy as np
import tensorflow_datasets as tfds

from experiments.common.errors import UserError
from experiments.data.archives import open_file
from experiments.data.preparation import ArrayRecordBuilder, SourceFile, find_source

BLOCK = 65_536  # bytes; the last block of a split is shorter


class ByteBlocksBuilder(ArrayRecordBuilder):
    """Examples are consecutive blocks of a split: concatenated in order they are the split.

    Built by one process, in seconds.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = ""
    HOMEPAGE = ""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.DESCRIPTION} Bytes in order, in blocks of {BLOCK:,}.",
            features=tfds.features.FeaturesDict(
                {"bytes": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")}
            ),
            disable_shuffling=True,
            homepage=self.HOMEPAGE,
            metadata=tfds.core.MetadataDict(),
        )

    def _generate_examples(self, blocks: Iterable[bytes]) -> Iterator[tuple[int, dict]]:
        for number, block in enumerate(blocks):
            yield number, {"bytes": np.frombuffer(block, np.uint8)}


class HundredMillionBuilder(ByteBlocksBuilder):
    """The two corpora of 10^8 bytes: 90, 5 and 5 million for training, validation and test.

    SOURCES are the files it can be made from; CONTENTS is the SHA-256 of the 10^8 bytes.
    """

    SIZE = 100_000_000
    SOURCES: Sequence[SourceFile] = ()
    CONTENTS: str | None = None

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        file, path = find_source(self, self.SOURCES)
        with open_file(path, self.name) as stream:
            contents = stream.read(self.SIZE + 1)  # bounded, whatever it unpacks to
        if len(contents) != self.SIZE:
            found = f"{len(contents):,}" if len(contents) < self.SIZE else "more"
            raise UserError(
                f"{path} has {found} bytes (unpacked) instead of {self.SIZE:,}: results on a part or on "
                f"another file are not {self.name}; configs/lm/bytes.py trains on the bytes of any file"
            )
        if self.CONTENTS not in (None, hashlib.sha256(contents).hexdigest()):
            raise UserError(f"{path} has the size of {self.name} but different contents; download {file.url} again")
        bounds = (0, self.SIZE * 90 // 100, self.SIZE * 95 // 100, self.SIZE)
        return {
            split: self._generate_examples(read_blocks(io.BytesIO(contents[start:end])))
            for split, (start, end) in zip(("train", "validation", "test"), itertools.pairwise(bounds), strict=True)
        }


def read_blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Yields the rest of a stream in blocks."""
    while block := stream.read(BLOCK):
        yield block
