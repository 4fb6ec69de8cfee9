"""Base classes of tasks: batches from sources, losses, metrics, and the baseline that a model must beat."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.common.config import within
from experiments.common.errors import UserError, require
from experiments.data.loader import HostShard, evaluation_dataset, read_ahead, train_dataset
from experiments.data.sources import Batch, Source, Subset
from experiments.tasks.features import BYTE_VOCABULARY, byte_symbol, pad
from seqboat.ops.losses import cross_entropy

MAX_SIZE = 2**31 - 1  # elements of a sequence or examples of a split: the loader's indices have 32 bits
LABELS = 1_000_037  # folded into the seed, so that which examples have labels is independent of their order
MAX_DRAWN = 2**24  # elements of a sequence, or symbols, drawn for every example

Scalar = Float[Array, ""]
Sums = dict[str, tuple[Array, Array]]  # name -> (sum, weight)


class Logits(Protocol):
    """The part of a model's output that the loss uses."""

    logits: Float[Array, "*B Y"]


class Task:
    """Batches from one source per split, a loss, and metrics.

    A task's module defines its `Config`, with the sizes that its model needs (`vocabulary_size`, or the `channels` of
    numbers, and `classes`), and its `Task`, which defines a batch by `row` and passes its sources to `__init__`. B is
    this process's share of the batch size. `weights` are 0 for rows that pad the last batch of an evaluation.
    """

    splits: tuple[str, ...] = ("validation", "test")  # for evaluation; training uses "train"
    selection_metric: str  # the metric that selects the best checkpoint
    higher_is_better: bool
    shuffled: bool = True  # whether to shuffle training examples; else the source's order
    baseline_name: str  # describes what `baseline` computes
    fixed_data: bool = False  # whether a run may only be resumed with the data that it began with
    sized_by: tuple[str, ...] = ()  # the config fields that determine how many examples a split has

    def __init__(
        self,
        config: Any,
        sources: Mapping[str, Source],
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`sources` has "train" and every evaluation split; `seed` determines only the order of training examples.

        Raises UserError for a split without examples.
        """
        self.config = config
        self._sources = sources
        for split in ("train", *self.splits):
            require(len(sources[split]) > 0, f"{self._sizes()}the {split} split{self.of_data} has no examples")
        self._rows = HostShard(batch_size, process_index, process_count)
        self._train = train_dataset(sources["train"], self.train_row, self._rows, seed, shuffled=self.shuffled)

    @property
    def fingerprint(self) -> dict[str, str]:
        """The fingerprint of the data, by part; empty if the config determines the data."""
        parts = [getattr(source, "fingerprint", {}) for source in self._sources.values()]
        return {name: digest for part in parts for name, digest in part.items()}

    @property
    def resolved(self) -> dict[str, Any]:
        """Fields of the config that the data have decided; the config of checkpoints has them."""
        return {}

    @property
    def of_data(self) -> str:
        """The data's name for errors: " of NAME", or "" without a name."""
        name = getattr(self._sources["train"], "name", None)
        return f" of {name}" if name else ""

    def _sizes(self) -> str:
        values = {field: getattr(self.config, field) for field in self.sized_by}
        given = ", ".join(f"config.task.{field}={value!r}" for field, value in values.items() if value)
        return given and f"{given}: "

    def row(self, example: Any) -> dict[str, Any]:
        """An example of a source as a row of every array of a batch."""
        raise NotImplementedError

    def train_row(self, example: Any) -> dict[str, Any]:
        """`row`, plus anything that only training needs."""
        return self.row(example)

    def example(self) -> Batch:
        """A batch of the shapes of all, whatever it holds."""
        return self.train_batch(0)

    def train_batch(self, step: int) -> Batch:
        """The training batch of a step: a pure function of (seed, step)."""
        return self._train[step]

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """Yields train_batch(start_step), train_batch(start_step + 1), ... without end, prefetched."""
        return read_ahead(self._train, start_step)

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yields every example of the split once, in order. Raises UserError for an unknown split."""
        return read_ahead(evaluation_dataset(self._evaluation_source(split), self.row, self._rows))

    def loss(self, output: Logits, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        """Sum of cross-entropies in nats, sum of weights, and each metric as a pair (sum, weight)."""
        weights, targets = batch["weights"], batch["targets"]
        weight_sum = jnp.sum(weights)
        loss_sum = jnp.sum(weights * cross_entropy(output.logits, targets))
        correct = jnp.argmax(output.logits, axis=-1) == targets
        metrics = {"loss": (loss_sum, weight_sum), "accuracy": (jnp.sum(weights * correct), weight_sum)}
        return loss_sum, weight_sum, metrics

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        """Metrics that evaluation reports besides those of the loss."""
        return {}

    def baseline(self, split: str) -> dict[str, float]:
        """Metrics of the baseline `baseline_name` on the split, computed from the data."""
        raise NotImplementedError

    def symbol(self, number: int) -> str:
        """Text to display an input id."""
        return byte_symbol(number) if self.config.vocabulary_size == BYTE_VOCABULARY else f"{number} "

    def class_name(self, number: int) -> str:
        """Text to display a class."""
        return str(number)

    def _check(self, split: str) -> None:
        require(split in self.splits, f"no evaluation split {split!r}; this task has: {', '.join(self.splits)}")

    def _evaluation_source(self, split: str) -> Source:
        self._check(split)
        return self._sources[split]


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """`length` is that of the padded input; longer sequences are cut. `vocabulary_size` includes the padding; None
    means that inputs are numbers. `labels` N trains on N examples, of every class equally many, that the run's seed
    draws; None on all."""

    length: int
    labels: int | None = None

    def __post_init__(self):
        within(self, 1, MAX_SIZE, "length")
        if self.labels is not None:
            within(self, 1, MAX_SIZE, "labels")


class ClassificationTask(Task):
    """Batches of padded sequences with one label each.

    A batch has `inputs` (B, L) int32 ids, 0 behind the length, or (B, L, F) float32; `lengths` (B,) int32; `targets`
    (B,) int32 in 0..Y-1; `weights` (B,) float32. Subclasses define `encode` and `label`.
    """

    selection_metric = "accuracy"
    higher_is_better = True
    baseline_name = "always the most common class"

    def __init__(self, config: Any, sources: Mapping[str, Source], *, seed: int, **batching: int):
        self.config, self._sources = config, sources
        if labels := getattr(config, "labels", None):
            sources = {**sources, "train": self._few(sources["train"], labels, seed)}
        super().__init__(config, sources, seed=seed, **batching)

    def _few(self, source: Source, count: int, seed: int) -> Source:
        """`count` examples, of every class equally many."""
        where, each = f"config.task.labels={count}", count // self.config.classes
        require(count % self.config.classes == 0, f"{where}: must be a multiple of the {self.config.classes} classes")
        targets = np.array([self.target(source[index]) for index in range(len(source))])
        order = np.random.default_rng((LABELS, seed)).permutation(len(targets))
        own = [order[targets[order] == label][:each] for label in range(self.config.classes)]
        require(min(map(len, own)) == each, f"{where}: a class has fewer than {each} examples")
        return Subset(source, np.sort(np.concatenate(own)))

    def encode(self, example: Any) -> np.ndarray:
        """One example as ids (at least 1) or numbers (length, F), of any length."""
        raise NotImplementedError

    def label(self, example: Any) -> int:
        return example["label"]

    def target(self, example: Any) -> np.int32:
        """The example's label. Raises UserError for one that is not a class."""
        label, classes = self.label(example), self.config.classes
        if not 0 <= label < classes:
            raise UserError(
                f"an example{self.of_data} has the label {label}; this task has the classes 0..{classes - 1}"
            )
        return np.int32(label)

    def row(self, example: Any) -> dict[str, Any]:
        values, size = self.encode(example), self.config.vocabulary_size
        if size is not None and len(values) and not 0 < values.min() <= values.max() < size:
            found = f"{values.min()}..{values.max()}"
            raise UserError(f"an example{self.of_data} has ids in {found}; this task has the ids 1..{size - 1}")
        inputs, length = pad(values, self.config.length)
        return {"inputs": inputs, "lengths": length, "targets": self.target(example)}

    @property
    def train_size(self) -> int:
        """How many training examples there are."""
        return len(self._sources["train"])

    def train_examples(self, most: int) -> tuple[Int[np.ndarray, "n"], Iterator[Batch]]:
        """The numbers of at most `most` evenly spaced training examples, and batches that hold each of them once, in
        order, as for evaluation."""
        numbers = np.linspace(0, self.train_size - 1, min(most, self.train_size)).round().astype(int)
        source = Subset(self._sources["train"], numbers)
        return numbers, read_ahead(evaluation_dataset(source, self.row, self._rows))

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        """`confusion` (Y, Y): for each true class, the fraction of each answer."""
        answers = jax.nn.one_hot(jnp.argmax(output.logits, axis=-1), self.config.classes)
        truth = jax.nn.one_hot(batch["targets"], self.config.classes) * batch["weights"][:, None]
        counts = truth.T @ answers
        return {"confusion": (counts, counts.sum(1, keepdims=True))}

    def baseline(self, split: str) -> dict[str, float]:
        """The most common class's share of the split."""
        source = self._evaluation_source(split)
        counts = np.bincount([self.target(source[index]) for index in range(len(source))])
        return {"accuracy": float(counts.max() / counts.sum())}


class TokenTask(Task):
    """Batches of id sequences with a target for every element that has a weight.

    A batch has `inputs` and `targets` (B, L) int32, `lengths` (B,) int32 and `weights` (B, L) float32. For a task with
    `slices`, an evaluation batch also has `slices` (B, L) int32, the number of the slice that an element belongs to.
    """

    slices: tuple[str, ...] = ()  # the names of the slices, for each of which evaluation reports the selection metric

    def loss(self, output: Logits, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        loss_sum, weight_sum, metrics = super().loss(output, batch)
        return loss_sum, weight_sum, metrics | {"bits_per_byte": (loss_sum / math.log(2), weight_sum)}

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        """For every slice its selection metric, and its `share` of the elements that have a weight."""
        if not self.slices:
            return {}
        weights, targets = batch["weights"], batch["targets"]
        if self.selection_metric == "bits_per_byte":
            values = cross_entropy(output.logits, targets) / math.log(2)
        else:
            values = jnp.argmax(output.logits, axis=-1) == targets
        found: Sums = {}
        for number, name in enumerate(self.slices):
            own = weights * (batch["slices"] == number)
            found[f"{self.selection_metric}_{name}"] = (jnp.sum(own * values), jnp.sum(own))
            found[f"share_{name}"] = (jnp.sum(own), jnp.sum(weights))
        return found


class ReconstructionTask(Task):
    """Tables of vectors to be predicted, of which a step draws rows with replacement by (seed, step), and an evaluation
    takes each once. Subclasses hold the tables: `inputs` (N, W), `targets` (N, W'), and `spread` (N,), the squared
    distance of a target from the mean of all; in a batch they have an axis of one element, as (B, 1, W).

    The loss is the squared error, summed over channels and rows, over the sum of the `spread`: that of the mean is 1.
    Metrics: `nmse` is that; `loss` the squared error per row; and of models that have them in their output, as
    `seqboat.models.dictionary`, `l0` features per row and `dead`, the share of features that did not fire in the last
    rows of training.
    """

    selection_metric = "nmse"
    higher_is_better = False

    def __init__(self, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
        self._sources: Mapping[str, Source] = {}
        self._seed, self._rows = seed, HostShard(batch_size, process_index, process_count)

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        return map(self.train_batch, itertools.count(start_step))

    def loss(self, output: Any, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        weights = batch["weights"]
        error = (weights * jnp.square(output.logits - batch["targets"]).sum(-1)).sum()
        spread, count = (weights * batch["spread"]).sum(), weights.sum()
        own = {name: getattr(output, name) for name in ("l0", "dead") if hasattr(output, name)}
        rows = {name: ((weights[:, 0] * value).sum(), count) for name, value in own.items()}
        return error, spread, {"loss": (error, count), "nmse": (error, spread), **rows}

    def baseline(self, split: str) -> dict[str, float]:
        self._check(split)
        return {"nmse": 1.0}

    def _drawn(self, table: Batch, step: int) -> Batch:
        size, count = self._rows.batch_size, len(table["inputs"])
        return self._batch(table, np.random.default_rng((self._seed, step)).integers(count, size=size))

    def _in_order(self, table: Batch) -> Iterator[Batch]:
        size, count = self._rows.batch_size, len(table["inputs"])
        for first in range(0, count, size):
            index = np.arange(first, first + size)
            yield self._batch(table, np.where(index < count, index, _NO_ROW))

    def _batch(self, table: Batch, index: np.ndarray) -> Batch:
        """This process's share of the rows at the given indices; _NO_ROW is a row of weight 0."""
        index = self._rows.cut(index)
        real = index != _NO_ROW
        take = lambda array: (array[index] * real.reshape(-1, *[1] * (array.ndim - 1)))[:, None]
        batch = {name: take(array) for name, array in table.items()}
        return {**batch, "weights": real.astype(np.float32)[:, None], "lengths": real.astype(np.int32)}


_NO_ROW = -1
