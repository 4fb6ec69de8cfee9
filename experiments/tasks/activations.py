"""Activations of a trained run, one vector per row, to be reconstructed: what dictionaries are trained on.

Chunk c holds the activations of the run's training batches c chunk ... (c + 1) chunk - 1. A step draws its rows from
one chunk, with replacement, by (seed, step): a batch is a function of them, nothing is written, and a run that is
resumed computes one chunk anew.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common.config import within
from experiments.common.errors import UserError, require
from experiments.data.loader import HostShard
from experiments.data.sources import Batch
from experiments.tasks import base
from experiments.tasks.base import MAX_SIZE, Scalar, Sums


@dataclasses.dataclass(frozen=True)
class Config:
    """The tap `site` of a `layer`, the first of which is 1, of the work directory or exported file `run`, at its
    `step`, by default the best. The targets are the same vectors, or those of `target_site`.

    `rows` are of "all" elements, or of the "active" ones, by default where only those have a value. An evaluation has
    those of `evaluation_batches` batches. `step`, `width` W and `target_width` W' are known once a run has begun, and
    are in its checkpoints' config.
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

    @property
    def channels(self) -> int | None:
        """Of the inputs, as `width`."""
        return self.width


class Rows(NamedTuple):
    """`inputs` (N, W), `targets` (N, W'), and `spread` (N,), the squared distance of each target from their mean."""

    inputs: np.ndarray
    targets: np.ndarray
    spread: np.ndarray


class Source(Protocol):
    """The run that activations are of (`experiments.training.activations`). `config` is the task's, complete;
    `positions` the elements of one of its batches, padding included."""

    config: Config
    positions: int
    splits: tuple[str, ...]
    fingerprint: dict[str, str]

    def rows(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (N, W) and targets (N, W') of consecutive batches of a split."""


class Task(base.Task):
    """For models with `l0` and `dead` (B,) in their output, as `seqboat.models.dictionary`.

    Batches of `inputs` (B, 1, W), `targets` (B, 1, W'), `weights` and `spread` (B, 1) float32, `lengths` (B,).

    The loss is the squared error, summed over channels and rows, over the sum of the `spread`: that of the mean is 1.
    Metrics: `nmse` is that; `loss` the squared error a row; `l0` features a row; `dead`, the share of features that did
    not fire in the last rows of training.
    """

    selection_metric = "nmse"
    higher_is_better = False
    baseline_name = "the mean of the activations"
    fixed_data = True

    def __init__(self, source: Source, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
        self.config, self.splits = source.config, source.splits
        self._source, self._seed = source, seed
        self._rows = HostShard(batch_size, process_index, process_count)
        self._steps = max(1, self.config.chunk * source.positions // batch_size)  # that read one chunk
        self._chunk: tuple[int, Rows] | None = None  # its number, and its rows

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
        rows = Rows(zeros(config.width), zeros(config.target_width), np.zeros(1, np.float32))
        return _batch(rows, self._rows.cut(np.zeros(self._rows.batch_size, int)))

    def train_batch(self, step: int) -> Batch:
        number = step // self._steps
        if self._chunk is None or self._chunk[0] != number:
            self._chunk = None  # frees it before the next one is made
            self._chunk = number, self._read("train", number * self.config.chunk, self.config.chunk)
        rows = self._chunk[1]
        drawn = np.random.default_rng((self._seed, step)).integers(len(rows.inputs), size=self._rows.batch_size)
        return _batch(rows, self._rows.cut(drawn))

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        return map(self.train_batch, itertools.count(start_step))

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        self._check(split)
        size, rows = self._rows.batch_size, self._read(split, 0, self.config.evaluation_batches)
        for first in range(0, len(rows.inputs), size):
            index = np.arange(first, first + size)
            yield _batch(rows, self._rows.cut(np.where(index < len(rows.inputs), index, _NO_ROW)))

    def loss(self, output: Any, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        weights = batch["weights"]
        error = (weights * jnp.square(output.logits - batch["targets"]).sum(-1)).sum()
        spread, count = (weights * batch["spread"]).sum(), weights.sum()
        of_rows = lambda value: ((weights[:, 0] * value).sum(), count)
        metrics = {"loss": (error, count), "nmse": (error, spread)}
        return error, spread, {**metrics, "l0": of_rows(output.l0), "dead": of_rows(output.dead)}

    def baseline(self, split: str) -> dict[str, float]:
        self._check(split)
        return {"nmse": 1.0}

    def _check(self, split: str) -> None:
        require(split in self.splits, f"no evaluation split {split!r}; this task has: {', '.join(self.splits)}")

    def _read(self, split: str, first: int, count: int) -> Rows:
        inputs, targets = self._source.rows(split, first, count)
        if not len(inputs):
            where, config = f"config.task.rows={self.config.rows!r}", self.config
            raise UserError(f"{where}: no element of layer {config.layer} of {config.run} is active; take rows='all'")
        return Rows(inputs, targets, np.square(targets - targets.mean(0)).sum(1))


_NO_ROW = -1


def _batch(rows: Rows, index: np.ndarray) -> Batch:
    """The rows at the given indices; _NO_ROW is a row of weight 0."""
    real = index != _NO_ROW
    take = lambda array: (array[index] * real.reshape(-1, *[1] * (array.ndim - 1)))[:, None]
    batch = {name: take(array) for name, array in rows._asdict().items()}
    return {**batch, "weights": real.astype(np.float32)[:, None], "lengths": real.astype(np.int32)}
