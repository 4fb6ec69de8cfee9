"""IMDB reviews (Maas et al. 2011), the labelled ones, from aclImdb_v1.tar.gz."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from experiments.data.archives import read_files
from experiments.data.preparation import ArrayRecordBuilder, SourceFile, check_count, find_source, show_progress

URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SOURCES = (
    SourceFile("aclImdb_v1.tar.gz", URL, "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"),
    SourceFile("aclImdb", URL),
)


class Builder(ArrayRecordBuilder):
    """The same examples, features and order as tensorflow-datasets' own, without the unlabelled reviews.

    Built by one process: unpacking dominates.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="plain_text", description="Plain text")
    ]
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 25_000, "test": 25_000}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Film reviews (UTF-8, surrounding white space removed) and whether they praise (1) or not (0).",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
            ),
            homepage="http://ai.stanford.edu/~amaas/data/sentiment/",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict]]]:
        _, path = find_source(self, SOURCES)
        return {split: self._generate_examples(path, split) for split in self.EXPECTED}

    def _generate_examples(self, path: Path, split: str) -> Iterator[tuple[str, dict]]:
        pattern = re.compile(rf"(?:aclImdb/)?({split}/(neg|pos)/[^/]+\.txt)")
        found = 0
        files = read_files(path, lambda name: pattern.fullmatch(name) is not None)
        for name, text in show_progress(files, self.EXPECTED[split], f"{self.name} {split}"):
            match = pattern.fullmatch(name)
            assert match
            found += 1
            # The key is the path in the archive, which gives the order of the stock data set.
            yield f"aclImdb/{match[1]}", {"text": text.strip(), "label": match[2]}
        check_count(path, found, self.EXPECTED[split], f"labelled {split} reviews")
