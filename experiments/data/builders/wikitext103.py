"""WikiText-103 (Merity et al. 2016, arXiv 1609.07843), the raw text, as bytes."""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from experiments.common.errors import UserError
from experiments.data.archives import open_file
from experiments.data.builders._byte_blocks import ByteBlocksBuilder, read_blocks
from experiments.data.preparation import SourceFile, find_source

URL = "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"
SOURCES = (
    SourceFile("wikitext-103-raw-v1.zip", URL, "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
    SourceFile("wikitext-103-raw", URL),
)
FILES = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}


class Builder(ByteBlocksBuilder):
    """The bytes of the three raw files. Published results are per word, so not comparable with results per byte."""

    DESCRIPTION = "Good and featured articles of the English Wikipedia, raw."
    HOMEPAGE = "https://arxiv.org/abs/1609.07843"

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        _, path = find_source(self, SOURCES)
        return {split: self._generate_examples(self._blocks(path, name)) for split, name in FILES.items()}

    def _blocks(self, path: Path, name: str) -> Iterator[bytes]:
        empty = True
        with open_file(path, name) as stream:
            for block in read_blocks(stream):
                empty = False
                yield block
        if empty:
            raise UserError(f"{path}: {name} is empty")
