"""What the tasks that classify sequences of ids share: batches, loss, metrics and the trivial baseline."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.data.loader import Batch, Rows, evaluation_dataset, read_ahead, train_dataset
from experiments.data.sources import Source
from experiments.errors import UserError
from seqboat.ops.losses import cross_entropy

Scalar = Float[Array, ""]


class Logits(Protocol):
    """What the loss needs of a model's output."""

    logits: Float[Array, "B Y"]


class ClassificationTask:
    """Batches of padded ids with one label each.

    A batch has `inputs` (B, L) int32 ids, 0 behind the length; `lengths` (B,) int32; `targets` (B,) int32 in 0..Y-1;
    and `weights` (B,) float32, 0 for the rows that only fill the last batch of an evaluation. B is this process's share
    of the batch size.

    A subclass says what is in its data by the class attributes and `encode`, and passes its sources to `__init__`.
    """

    headline = "accuracy"  # picks the best checkpoint
    higher_is_better = True
    splits: tuple[str, ...] = ("validation", "test")  # evaluation; training is on "train"
    vocabulary_size: int  # ids, with padding
    classes: int

    def __init__(
        self,
        sources: Mapping[str, Source],
        length: int,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`sources` has "train" and every evaluation split; `seed` decides the order of training examples alone."""
        require(length >= 1, f"config.task.length is {length}; it must be at least 1")
        self.length = length
        self._sources = sources
        self._rows = Rows(batch_size, process_index, process_count)
        self._train = train_dataset(sources["train"], self._row, self._rows, seed)

    def encode(self, example: Any) -> tuple[np.ndarray, int]:
        """The ids (1 and above, of any length) and the label of one example of a source."""
        raise NotImplementedError

    def train_batch(self, step: int) -> Batch:
        """The training batch of a step: a pure function of (seed, step)."""
        return self._train[step]

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """train_batch(start_step), train_batch(start_step + 1), ... without end, read ahead."""
        return read_ahead(self._train, start_step)

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Every example of the split once, in order. Raises UserError if there is no such split."""
        return read_ahead(evaluation_dataset(self._evaluation_source(split), self._row, self._rows))

    def loss(
        self, output: Logits, batch: Mapping[str, Array]
    ) -> tuple[Scalar, Scalar, dict[str, tuple[Scalar, Scalar]]]:
        """Sum of cross-entropies in nats, sum of weights, and each metric as such a pair."""
        weights = batch["weights"]
        weight_sum = jnp.sum(weights)
        loss_sum = jnp.sum(weights * cross_entropy(output.logits, batch["targets"]))
        correct = jnp.argmax(output.logits, axis=-1) == batch["targets"]
        metrics = {"loss": (loss_sum, weight_sum), "accuracy": (jnp.sum(weights * correct), weight_sum)}
        return loss_sum, weight_sum, metrics

    def trivial(self, split: str) -> dict[str, float]:
        """What always answering the split's most frequent class gets: that class's share, computed from the data."""
        source = self._evaluation_source(split)
        counts = np.bincount([self.encode(source[index])[1] for index in range(len(source))])
        return {"accuracy": float(counts.max() / counts.sum())}

    def _evaluation_source(self, split: str) -> Source:
        require(split in self.splits, f"no evaluation split {split!r}; this task has: {', '.join(self.splits)}")
        return self._sources[split]

    def _row(self, example: Any) -> dict[str, Any]:
        ids, label = self.encode(example)
        length = min(len(ids), self.length)
        inputs = np.zeros(self.length, np.int32)
        inputs[:length] = ids[:length]
        return {"inputs": inputs, "lengths": np.int32(length), "targets": np.int32(label)}


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
