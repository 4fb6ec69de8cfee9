"""LRA's document retrieval (Tay et al. 2021; ACL Anthology Network, Radev et al. 2013), from the LRA release."""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from experiments.common.errors import UserError
from experiments.data.archives import open_file
from experiments.data.preparation import (
    ArrayRecordBuilder,
    SourceFile,
    command,
    find_source,
    record_source,
    show_progress,
    source_digest,
)

ARCHIVE = SourceFile("lra_release.gz", "https://storage.googleapis.com/long-range-arena/lra_release.gz")
FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
FOLDERS = ("", "tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data")
MOST_BYTES = 2**24  # of a row; two papers have some 100,000
COLUMNS = ("label", "id1", "id2", "text1", "text2")


class Builder(ArrayRecordBuilder):
    """Pairs of papers, and whether one cites the other (1).

    Built from the three unpacked tsv files, or from the archive itself, which is read once per split. Texts are the raw
    bytes of the files, as in LRA's own loader: not decoded, and including the b'...' around them in the release. Built
    by one process.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pairs of papers of the ACL Anthology Network, and whether one cites the other (1) or not (0).",
            features=tfds.features.FeaturesDict(
                {
                    "text1": tfds.features.Text(),
                    "text2": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(num_classes=2),
                }
            ),
            homepage="https://arxiv.org/abs/2011.04006",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        path = self._find()
        return {split: self._generate_examples(path, split) for split in FILES}

    def _find(self) -> Path:
        """The folder with the three files, or the archive."""
        for folder in (self.manual_dir / name for name in FOLDERS):
            missing = [name for name in FILES.values() if not (folder / name).is_file()]
            if not missing:
                for name in FILES.values():
                    record_source(self, folder / name, source_digest(folder / name))
                return folder
            if len(missing) < len(FILES):
                raise UserError(
                    f"{folder} lacks {' and '.join(missing)}: get it from {ARCHIVE.url} (a tar.gz, folder "
                    f"lra_release/lra_release/tsv_data), then run: {command(self)}"
                )
        if (self.manual_dir / ARCHIVE.name).exists():
            return find_source(self, [ARCHIVE])[1]
        raise UserError(
            f"data set {self.name!r} is made from {', '.join(FILES.values())}, and none is in {self.manual_dir}: "
            f"download {ARCHIVE.url} into it (a tar.gz; unpacking only its folder tsv_data is enough and faster), "
            f"then run: {command(self)}"
        )

    def _generate_examples(self, path: Path, split: str) -> Iterator[tuple[int, dict]]:
        name = FILES[split]
        found = 0
        with open_file(path, name) as file:
            lines = iter(lambda: file.readline(MOST_BYTES + 1), b"")
            for row, line in enumerate(show_progress(lines, None, f"{self.name} {split}"), 1):
                where = f"{path / name if path.is_dir() else f'{path}: {name}'}, row {row}"
                if len(line) > MOST_BYTES:
                    raise UserError(f"{where} has more than {MOST_BYTES:,} bytes: this is a different file")
                if line.strip():
                    found += 1
                    yield row, parse(line, where)
        if not found:
            raise UserError(f"{path}: {name} is empty")


def parse(line: bytes, where: str) -> dict:
    """The example of one row. Raises UserError naming `where` if a column is missing, or a document is empty."""
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(COLUMNS):
        raise UserError(f"{where} has {len(fields)} columns instead of {len(COLUMNS)}: {', '.join(COLUMNS)}")
    example = dict(zip(COLUMNS, fields, strict=True))
    labels = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
    if example["label"] not in labels:
        raise UserError(f"{where}: the label is {example['label'][:20].decode(errors='replace')!r} instead of 0 or 1")
    for name in ("text1", "text2"):
        if not example[name]:
            raise UserError(f"{where}: {name} is empty")
    return {"text1": example["text1"], "text2": example["text2"], "label": labels[example["label"]]}
