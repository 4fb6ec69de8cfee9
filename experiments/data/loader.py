"""Batches from a source, on grain: a random-access data set whose element `step` is the batch of that step.

Batches are defined globally and each host reads its own rows, so the order of examples depends neither on the number
of hosts nor on where a run resumes: the step is the only state.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from experiments.common.errors import UserError
from experiments.data.sources import Batch, Source

Transform = Callable[[Any], dict[str, Any]]  # an example -> its row of every array of the batch

_THREADS = 2  # one batch each; rows of up to 4000 elements do not saturate one
_BATCHES_AHEAD = 8


@dataclass(frozen=True)
class HostShard:
    """The rows of every global batch that this host reads: block `process_index` of `process_count` equal blocks.

    Raises UserError if the batch does not divide evenly.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.batch_size % self.process_count:
            raise UserError(
                f"batch_size is {self.batch_size}; it must be a multiple of the {self.process_count} processes"
            )
        if not 0 <= self.process_index < self.process_count:
            raise UserError(f"process_index is {self.process_index} of {self.process_count} processes")

    def cut(self, batch: Int[np.ndarray, " B"]) -> Int[np.ndarray, " b"]:
        share = self.batch_size // self.process_count
        return batch[self.process_index * share : (self.process_index + 1) * share]


def train_dataset(
    source: Source, transform: Transform, rows: HostShard, seed: int, *, shuffled: bool = True
) -> grain.MapDataset:
    """Endless batches; element `step` is a pure function of (seed, step).

    Every epoch is a new permutation of the source if `shuffled`, else the source's order. The last batch of an epoch
    is filled from the next epoch.
    """
    if not 0 <= seed < 2**32:  # grain's bounds
        raise UserError(f"seed is {seed}; it must be in 0..{2**32 - 1}")
    indices = grain.MapDataset.range(_size(source)).seed(seed)
    indices = (indices.shuffle() if shuffled else indices).repeat()
    read = _Reader(source, transform)
    return indices.batch(rows.batch_size, drop_remainder=True).map(lambda batch: read(rows.cut(batch)))


def evaluation_dataset(source: Source, transform: Transform, rows: HostShard) -> grain.MapDataset:
    """Every example once, in order. The last batch is padded with rows of weight 0, so hosts have equally many
    batches."""
    size = _size(source)
    read = _Reader(source, transform)

    def batch(step: int) -> Batch:
        indices = np.arange(step * rows.batch_size, (step + 1) * rows.batch_size)
        return read(rows.cut(np.where(indices < size, indices, _NO_EXAMPLE)))

    return grain.MapDataset.range(-(-size // rows.batch_size)).map(batch)


def read_ahead(dataset: grain.MapDataset, start: int = 0) -> Iterator[Batch]:
    """dataset[start], dataset[start + 1], ..., prefetched by threads."""
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    return iter(dataset[start:].to_iter_dataset(options))


_NO_EXAMPLE = -1


class _Reader:
    """Indices -> batch: the transformed examples stacked; index _NO_EXAMPLE gives zeros.

    `weights` are the transform's own if it sets them, else 1 for an example and 0 for none.
    """

    def __init__(self, source: Source, transform: Transform):
        self._source = source
        self._transform = transform
        self._zeros = {name: np.zeros_like(value) for name, value in transform(source[0]).items()}

    def __call__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        rows = [self._zeros if i == _NO_EXAMPLE else self._transform(self._source[int(i)]) for i in indices]
        batch = {name: np.stack([row[name] for row in rows]) for name in self._zeros}
        return {"weights": (indices != _NO_EXAMPLE).astype(np.float32), **batch}


def _size(source: Source) -> int:
    if len(source) == 0:
        raise UserError("the data set has no examples to make a batch of")
    return len(source)
