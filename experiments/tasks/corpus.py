"""Language modelling on the bytes of a corpus: enwik8, text8, WikiText-103, or any files of the user's.

Training reads contiguous blocks and predicts every byte of a block, the first from the byte before it. Validation reads
its split the same way. Testing scores every byte exactly once, with up to `context` bytes before the first scored one
(the published protocol for enwik8: 1192 new bytes after up to 7000).

With `carry_state`, row b of the batches is a stream: each step's block continues where the previous step's ended.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from experiments.common.config import at_most, within
from experiments.common.errors import UserError, require
from experiments.common.files import user_path
from experiments.data.loader import evaluation_dataset, read_ahead
from experiments.data.packed import read_text
from experiments.data.sources import Batch, open_split
from experiments.tasks.base import MAX_SIZE, TokenTask
from experiments.tasks.features import BYTE_VOCABULARY, byte_ids, pad

Bytes = UInt8[np.ndarray, " N"]
REPEATED = 8  # bytes of a string that counts as repeated: few of this length are so by chance


@dataclasses.dataclass(frozen=True)
class Config:
    """A prepared `dataset`, or the concatenation of `files` (plain, packed by gzip, xz or bzip2, or the only file of a
    zip), cut by `fractions` into train, validation and test. `length` is that of a sequence, of which testing uses
    `context` as unscored context. `evaluation_bytes` N uses only the first N bytes of the validation and test splits;
    None uses all.
    `carry_state`: training carries the model's state from block to block, with one stream per row of the batch, and
    validation is one pass with as many streams. With `repeat_distance` N, evaluation also reports bits per byte by
    slice: bytes that end a string of 8 bytes that was last seen in the same block within N bytes, farther back, or not.
    """

    dataset: str | None = None
    files: tuple[str, ...] = ()
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)
    length: int = 8192
    context: int = 7000
    evaluation_bytes: int | None = at_most(2**63 - 1, default=None)
    carry_state: bool = False
    repeat_distance: int | None = None

    @property
    def vocabulary_size(self) -> int:
        return BYTE_VOCABULARY

    def __post_init__(self):
        within(self, 1, MAX_SIZE, "length")
        if not 0 <= self.context < self.length:
            raise ValueError(f"context={self.context}: must be at least 0 and below length={self.length}")
        if self.evaluation_bytes is not None and self.evaluation_bytes < 1:
            raise ValueError(f"evaluation_bytes={self.evaluation_bytes}: must be at least 1, or None for all")
        if self.repeat_distance is not None:
            within(self, 1, MAX_SIZE, "repeat_distance")
        if len(self.fractions) != 3 or min(self.fractions) <= 0 or not math.isclose(sum(self.fractions), 1):
            raise ValueError(f"fractions={self.fractions}: must be three above 0 with sum 1")


class Task(TokenTask):
    selection_metric = "bits_per_byte"
    higher_is_better = False
    baseline_name = "the bytes' frequencies in training"

    def __init__(self, config: Config, *, data_dir: str | None, batch_size: int, **batching: int):
        """`batching` is seed, process_index and process_count, as in Task."""
        require(
            (config.dataset is None) == bool(config.files),
            "config.task: name text files, as in --config.task.files='(\"a.txt\",)', or a prepared corpus by dataset; "
            + ("neither is set" if config.dataset is None else "both are set"),
        )
        read = read_files(config) if config.dataset is None else read_corpus(config.dataset, data_dir)
        self.bytes, self._fingerprint = read
        for split in self.splits:
            self.bytes[split] = self.bytes[split][: config.evaluation_bytes]
        for split, data in self.bytes.items():
            require(
                not config.carry_state or not 0 < len(data) < batch_size,
                f"config.task.carry_state=True: the {split} split has {len(data)} bytes for {batch_size} streams, "
                "one per row of config.train.batch_size",
            )
        train = self.bytes["train"]
        sources = {
            "train": Streams(train, config.length, batch_size) if config.carry_state else Windows(train, config.length),
            "validation": Windows(self.bytes["validation"], config.length),
            "test": Windows(self.bytes["test"], config.length, config.context),
        }
        self.slices = ("near_repeats", "far_repeats", "the_rest") if config.repeat_distance else ()
        self.shuffled = not config.carry_state
        self.sized_by = ("dataset",) if config.dataset else ("files", "fractions")
        super().__init__(config, sources, batch_size=batch_size, **batching)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._fingerprint

    def streams(self, split: str, count: int) -> Iterator[Batch]:
        """The split in one pass, as `count` streams that each start empty: batches of the next `length` bytes of each.

        Every byte is scored once. A stream first reads the `context` bytes before its part, unscored.
        """
        self._evaluation_source(split)  # rejects an unknown split
        data = self.bytes[split]
        require(
            1 <= count <= len(data),
            f"--streams={count}: the {split} split has {len(data)} bytes; choose 1..{len(data)}",
        )
        source = Streams(data, self.config.length, count, self.config.context)
        return read_ahead(evaluation_dataset(source, self.row, dataclasses.replace(self._rows, batch_size=count)))

    def train_row(self, example: tuple[np.ndarray, int]) -> dict[str, Any]:
        """`row`, plus with `carry_state` whether its stream `begins` here."""
        return self._block(example) | ({"begins": example[0][0] == 0} if self.config.carry_state else {})

    def row(self, example: tuple[np.ndarray, int]) -> dict[str, Any]:
        """A window's bytes, with 0 in front at the start of the stream, and how many of its targets were already
        scored."""
        if self.config.repeat_distance is None:
            return self._block(example)
        distances, _ = pad(repeat_distances(example[0][1:]), self.config.length)
        slices = np.where(distances == 0, 2, distances > self.config.repeat_distance)
        return self._block(example) | {"slices": slices.astype(np.int32)}

    def _block(self, example: tuple[np.ndarray, int]) -> dict[str, Any]:
        ids, scored = example
        length = self.config.length
        inputs, count = pad(ids[:-1], length)
        targets, _ = pad(ids[1:], length)
        weights = ((np.arange(length) >= scored) & (np.arange(length) < count)).astype(np.float32)
        return {"inputs": inputs, "lengths": count, "targets": targets, "weights": weights}

    def baseline(self, split: str) -> dict[str, float]:
        """Cross-entropy of the split under the training frequencies, with add-one smoothing."""
        self._evaluation_source(split)  # rejects an unknown split
        train = np.bincount(self.bytes["train"], minlength=256) + 1
        found = np.bincount(self.bytes[split], minlength=256)
        return {"bits_per_byte": float(-(found * np.log2(train / train.sum())).sum() / found.sum())}


class Windows:
    """Windows of `length` targets over a stream of bytes, as (ids of the byte before the first target and of all
    targets, number of targets scored by an earlier window). Every byte is scored exactly once, given at least `context`
    previous bytes if the stream has them.
    """

    def __init__(self, data: Bytes, length: int, context: int = 0):
        self._data, self._context, self._new = data, context, length - context

    def __len__(self) -> int:
        return -(-len(self._data) // self._new)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        first = index * self._new
        start = max(0, first - self._context)
        before = byte_ids(self._data[start - 1 : start]) if start else np.zeros(1, np.int32)
        return np.concatenate([before, byte_ids(self._data[start : first + self._new])]), first - start


class Streams:
    """`count` parallel streams over consecutive parts of the bytes, whose lengths differ by at most one.

    Example t * count + b is the t-th of the `Windows` of stream b, empty after its end. A stream starts with up to
    `context` unscored bytes before its part.
    """

    def __init__(self, data: Bytes, length: int, count: int, context: int = 0):
        ends = [len(data) * b // count for b in range(count + 1)]
        self._before = [min(first, context) for first in ends[:-1]]
        spans = zip(self._before, itertools.pairwise(ends), strict=True)
        self._windows = [Windows(data[first - before : end], length) for before, (first, end) in spans]
        self._length = length

    def __len__(self) -> int:
        return len(self._windows) * max(map(len, self._windows))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        t, stream = divmod(index, len(self._windows))
        return self._windows[stream][t][0], max(0, self._before[stream] - t * self._length)


def repeat_distances(ids: np.ndarray) -> np.ndarray:
    """How far back the string of 8 bytes that ends at each element ended last; 0 where it is new or not yet 8 long."""
    distances = np.zeros(len(ids), np.int32)
    if len(ids) >= REPEATED:
        strings = np.lib.stride_tricks.sliding_window_view((ids - 1).astype(np.uint64), REPEATED)
        codes = (strings << np.arange(0, 8 * REPEATED, 8, dtype=np.uint64)).sum(1)
        order = np.argsort(codes, kind="stable")
        again = np.diff(codes[order]) == 0
        distances[order[1:][again] + REPEATED - 1] = np.diff(order)[again]
    return distances


def read_corpus(name: str, data_dir: str | None) -> tuple[dict[str, Bytes], dict[str, str]]:
    """The full splits of a prepared corpus, whose examples are consecutive pieces, and their fingerprints."""
    splits = {split: open_split(name, split, data_dir, ("bytes",)) for split in ("train", "validation", "test")}
    found = {
        split: np.concatenate([source[i]["bytes"] for i in range(len(source))]) for split, source in splits.items()
    }
    for split, data in found.items():
        require(
            data.dtype == np.uint8,
            f"config.task.dataset={name!r}: its {split} split holds {data.dtype}, expected bytes",
        )
    return found, {part: digest for source in splits.values() for part, digest in source.fingerprint.items()}


def read_files(config: Config) -> tuple[dict[str, Bytes], dict[str, str]]:
    """The concatenated files, cut by the config's fractions, and a fingerprint of each file."""
    pieces = [_read(name) for name in config.files]
    data = np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces])
    ends = np.round(np.cumsum(config.fractions) * len(data)).astype(int)
    fingerprint = {
        f"config.task.files[{number}]": f"{len(piece):,} bytes, sha256 {hashlib.sha256(piece).hexdigest()}"
        for number, piece in enumerate(pieces)
    }
    return dict(zip(("train", "validation", "test"), np.split(data, ends[:2]), strict=True)), fingerprint


def _read(name: str) -> bytearray:
    path = user_path(name, "config.task.files")
    if not path.is_file():  # reading a pipe would block
        raise UserError(
            f"config.task.files: there is no regular file {path}; for a trained run, --data_dir gives its new directory"
        )
    try:
        return read_text(path)
    except UserError as error:
        raise UserError(f"config.task.files: {error}") from error
