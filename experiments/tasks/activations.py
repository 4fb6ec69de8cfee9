"""Activations of a trained run, one vector per row, to be reconstructed: what dictionaries are trained on.

Chunk c holds the activations of the run's training batches c chunk ... (c + 1) chunk - 1. A step draws its rows from
one chunk, with replacement, by (seed, step): a batch is a function of them, nothing is written, and a run that is
resumed computes one chunk anew.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from experiments.common.config import within
from experiments.common.errors import UserError
from experiments.data.sources import Batch
from experiments.tasks.base import MAX_SIZE, ReconstructionTask


@dataclasses.dataclass(frozen=True)
class Config:
    """The tap `site` of a `layer`, the first of which is 1, of the work directory or exported file `run`, at its
    `step`, by default the best. The targets are the same vectors, or those of `target_site`.

    `rows` are of "all" elements, or of the "active" ones, by default where only those have a value at
    either site. An evaluation has those of `evaluation_batches` batches. `step`, `width` W and `target_width` W' are
    known once a run has begun, and are in its checkpoints' config.
    """

    vocabulary_size: ClassVar[None] = None
    run: str | None = None
    step: int | None = None
    site: str = "m"
    layer: int = 1
    target_site: str | None = None
    rows: Literal["all", "active"] | None = None
    chunk: int = 32
    evaluation_batches: int = 16
    width: int | None = None
    target_width: int | None = None

    def __post_init__(self):
        within(self, 1, MAX_SIZE, "layer", "chunk", "evaluation_batches")
        if self.target_site == self.site:
            raise ValueError(f"target_site={self.site!r}: is the site itself; leave it out to reconstruct that")

    @property
    def channels(self) -> int | None:
        """Of the inputs, as `width`."""
        return self.width


class Source(Protocol):
    """The run that activations are of (`experiments.training.activations`). `config` is the task's, complete;
    `positions` the elements of one of its batches, padding included."""

    config: Config
    positions: int
    splits: tuple[str, ...]
    fingerprint: dict[str, str]

    def rows(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (N, W) and targets (N, W') of consecutive batches of a split."""


class Task(ReconstructionTask):
    """For models of vectors: `seqboat.models.dictionary`, `seqboat.models.autoencoder`."""

    baseline_name = "the mean of the activations"
    fixed_data = True

    def __init__(self, source: Source, *, batch_size: int, **batching: int):
        super().__init__(batch_size=batch_size, **batching)
        self.config, self.splits = source.config, source.splits
        self._source = source
        self._steps = max(1, self.config.chunk * source.positions // batch_size)  # that read one chunk
        self._chunk: tuple[int, Batch] | None = None  # its number, and its table

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._source.fingerprint

    @property
    def resolved(self) -> dict[str, Any]:
        """The config's fields, complete."""
        return dataclasses.asdict(self.config)

    def example(self) -> Batch:
        config = self.config
        zeros = lambda width: np.zeros((1, width or config.width), np.float32)
        return self._drawn(_table(zeros(config.width), zeros(config.target_width)), 0)

    def train_batch(self, step: int) -> Batch:
        number = step // self._steps
        if self._chunk is None or self._chunk[0] != number:
            self._chunk = None  # frees it before the next one is made
            self._chunk = number, self._read("train", number * self.config.chunk, self.config.chunk)
        return self._drawn(self._chunk[1], step)

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        self._check(split)
        yield from self._in_order(self._read(split, 0, self.config.evaluation_batches))

    def _read(self, split: str, first: int, count: int) -> Batch:
        inputs, targets = self._source.rows(split, first, count)
        if not len(inputs):
            where, config = f"config.task.rows={self.config.rows!r}", self.config
            raise UserError(f"{where}: no element of layer {config.layer} of {config.run} is active; take rows='all'")
        return _table(inputs, targets)


def _table(inputs: np.ndarray, targets: np.ndarray) -> Batch:
    return {"inputs": inputs, "targets": targets, "spread": np.square(targets - targets.mean(0)).sum(1)}
