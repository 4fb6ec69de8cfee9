"""What tasks share: batches from sources, losses, metrics, and the trivial answer that a model must beat."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.common.config import at_most
from experiments.common.errors import UserError
from experiments.data.loader import Batch, Rows, evaluation_dataset, read_ahead, train_dataset
from experiments.data.sources import Generated, Source
from seqboat.ops.losses import cross_entropy

LONGEST = 2**31 - 1  # elements of a sequence or examples of a split: what the loader's 32-bit indices take
MOST_DRAWN = 2**24  # elements of a sequence, or symbols, that are drawn for every example
BYTE_VOCABULARY = 257  # every byte plus one, and padding, 0: LRA's ByteTextEncoder

Scalar = Float[Array, ""]
Sums = dict[str, tuple[Array, Array]]  # name -> (sum, weight)


class Logits(Protocol):
    """What the loss needs of a model's output."""

    logits: Float[Array, "*B Y"]


class Task:
    """Batches of one source for each split, a loss, metrics.

    A task's module holds its `Config`, with the sizes that its model needs (`vocabulary_size`, `classes`), and its
    `Task`, which says by `row` what a batch holds and passes its sources to `__init__`. B is this process's share
    of the batch size. `weights` are 0 for the rows that only fill the last batch of an evaluation.
    """

    splits: tuple[str, ...] = ("validation", "test")  # evaluation; training is on "train"
    headline: str  # the metric that picks the best checkpoint
    higher_is_better: bool
    shuffled: bool = True  # the order of training examples; else the source's own
    trivial_answer: str  # what `trivial` computes, in words
    sized_by: tuple[str, ...] = ()  # the fields of its config that decide how many examples a split has

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
        """`sources` has "train" and every evaluation split; `seed` decides the order of training examples alone.

        Raises UserError for a split without examples.
        """
        self.config = config
        self._sources = sources
        for split in ("train", *self.splits):
            require(len(sources[split]) > 0, f"{self._sizes()}the {split} split{self.of_data} has no examples")
        self._rows = Rows(batch_size, process_index, process_count)
        self._train = train_dataset(sources["train"], self.train_row, self._rows, seed, shuffled=self.shuffled)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the data, each part by name; empty where the data follow from the config."""
        parts = [getattr(source, "fingerprint", {}) for source in self._sources.values()]
        return {name: digest for part in parts for name, digest in part.items()}

    @property
    def of_data(self) -> str:
        """The data in errors: " of NAME", or nothing where they have no name."""
        name = getattr(self._sources["train"], "name", None)
        return f" of {name}" if name else ""

    def _sizes(self) -> str:
        values = {field: getattr(self.config, field) for field in self.sized_by}
        given = ", ".join(f"config.task.{field}={value!r}" for field, value in values.items() if value)
        return given and f"{given}: "

    def row(self, example: Any) -> dict[str, Any]:
        """An example of a source as its row of every array of a batch."""
        raise NotImplementedError

    def train_row(self, example: Any) -> dict[str, Any]:
        """`row`, and what only training needs."""
        return self.row(example)

    def train_batch(self, step: int) -> Batch:
        """The training batch of a step: a pure function of (seed, step)."""
        return self._train[step]

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """train_batch(start_step), train_batch(start_step + 1), ... without end, read ahead."""
        return read_ahead(self._train, start_step)

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Every example of the split once, in order. Raises UserError if there is no such split."""
        return read_ahead(evaluation_dataset(self._evaluation_source(split), self.row, self._rows))

    def loss(self, output: Logits, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        """Sum of cross-entropies in nats, sum of weights, and each metric as such a pair."""
        weights, targets = batch["weights"], batch["targets"]
        weight_sum = jnp.sum(weights)
        loss_sum = jnp.sum(weights * cross_entropy(output.logits, targets))
        correct = jnp.argmax(output.logits, axis=-1) == targets
        metrics = {"loss": (loss_sum, weight_sum), "accuracy": (jnp.sum(weights * correct), weight_sum)}
        return loss_sum, weight_sum, metrics

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        """What evaluation reports besides the metrics of the loss."""
        return {}

    def trivial(self, split: str) -> dict[str, float]:
        """What `trivial_answer` gets on the split, computed from the data."""
        raise NotImplementedError

    def symbol(self, number: int) -> str:
        """How people see an input of that id."""
        return byte_symbol(number) if self.config.vocabulary_size == BYTE_VOCABULARY else f"{number} "

    def _evaluation_source(self, split: str) -> Source:
        require(split in self.splits, f"no evaluation split {split!r}; this task has: {', '.join(self.splits)}")
        return self._sources[split]


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """`length` is that of the padded input; longer sequences are cut. `vocabulary_size` counts the padding; None are
    numbers as inputs."""

    length: int

    def __post_init__(self):
        within(self, 1, LONGEST, "length")


class ClassificationTask(Task):
    """Batches of padded sequences with one label each.

    A batch has `inputs` (B, L) int32 ids, 0 behind the length, or (B, L, F) float32; `lengths` (B,) int32; `targets`
    (B,) int32 in 0..Y-1; `weights` (B,) float32. A subclass says what is in its data by `encode` and `label`.
    """

    headline = "accuracy"
    higher_is_better = True
    trivial_answer = "always the commonest class"

    def encode(self, example: Any) -> np.ndarray:
        """The ids (1 and above), or the numbers (length, F), of one example; of any length."""
        raise NotImplementedError

    def label(self, example: Any) -> int:
        return example["label"]

    def target(self, example: Any) -> np.int32:
        """Its label. Raises UserError for one that is not a class."""
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

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        """`confusion` (Y, Y): of each true class, the share that was given each answer."""
        answers = jax.nn.one_hot(jnp.argmax(output.logits, axis=-1), self.config.classes)
        truth = jax.nn.one_hot(batch["targets"], self.config.classes) * batch["weights"][:, None]
        counts = truth.T @ answers
        return {"confusion": (counts, counts.sum(1, keepdims=True))}

    def trivial(self, split: str) -> dict[str, float]:
        """That class's share of the split."""
        source = self._evaluation_source(split)
        counts = np.bincount([self.target(source[index]) for index in range(len(source))])
        return {"accuracy": float(counts.max() / counts.sum())}


class TokenTask(Task):
    """Batches of id sequences with a target for every element that has a weight.

    A batch has `inputs` and `targets` (B, L) int32, `lengths` (B,) int32 and `weights` (B, L) float32.
    """

    def loss(self, output: Logits, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        loss_sum, weight_sum, metrics = super().loss(output, batch)
        return loss_sum, weight_sum, metrics | {"bits": (loss_sum / math.log(2), weight_sum)}


@dataclasses.dataclass(frozen=True)
class SlotConfig:
    """Generated examples: how many, and from which seed; the order of training examples has the run's own seed."""

    train_examples: int = 1_000_000
    test_examples: int = 2048
    data_seed: int = at_most(2**63 - 1, default=0)

    def __post_init__(self):
        within(self, 1, LONGEST, "train_examples", "test_examples")
        if self.data_seed < 0:
            raise ValueError(f"data_seed={self.data_seed}: must not be negative")


class SlotTask(TokenTask):
    """Generated sequences whose last elements are slots to be answered; the loss is on the slots alone."""

    headline = "accuracy"
    higher_is_better = True

    def __init__(self, config: Any, chance: float, **batching: int):
        """`chance` is the accuracy of the trivial answer; `batching` as in Task."""
        self._chance = chance
        sizes = {"train": config.train_examples, "validation": config.test_examples, "test": config.test_examples}
        sources = {
            split: Generated(self.draw, config.data_seed, number, size)
            for number, (split, size) in enumerate(sizes.items())
        }
        super().__init__(config, sources, **batching)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The ids of one example, and the answers of its last elements."""
        raise NotImplementedError

    def row(self, example: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        inputs, answers = example
        before = len(inputs) - len(answers)
        return {
            "inputs": inputs.astype(np.int32),
            "lengths": np.int32(len(inputs)),
            "targets": np.concatenate([np.zeros(before), answers]).astype(np.int32),
            "weights": np.concatenate([np.zeros(before), np.ones(len(answers))]).astype(np.float32),
        }

    def trivial(self, split: str) -> dict[str, float]:
        self._evaluation_source(split)  # refuses an unknown one
        return {"accuracy": self._chance}


def pad(values: np.ndarray, length: int) -> tuple[np.ndarray, np.int32]:
    """A sequence cut or filled with zeros to `length`, int32 or float32, and how much of it is real."""
    kept = values[:length]
    padded = np.zeros((length, *values.shape[1:]), np.float32 if values.dtype.kind == "f" else np.int32)
    padded[: len(kept)] = kept
    return padded, np.int32(len(kept))


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """Pictures as sequences of one number a pixel."""

    vocabulary_size: ClassVar[None] = None
    mean: float
    deviation: float

    def __post_init__(self):
        if not 0 < self.deviation < math.inf:
            raise ValueError(f"deviation={self.deviation}: must be above 0 and finite")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean}: must be finite")


def pixels(image: np.ndarray, config: PixelConfig) -> Float[np.ndarray, "L 1"]:
    """A picture of 0..255, row by row, as  (p / 255 - mean) / deviation."""
    values = image.reshape(-1, 1).astype(np.float32) / np.float32(255)
    return (values - np.float32(config.mean)) / np.float32(config.deviation)


@dataclasses.dataclass(frozen=True)
class Standard:
    """Numbers brought to the mean 0 and deviation 1 of a whole source."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, source: Source, field: str) -> "Standard":
        """Exact, in float64, over every number of that field; reads the source once."""
        count = total = squares = 0.0
        for index in range(len(source)):
            values = np.asarray(source[index][field], np.float64)
            count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
        require(count > 0, f"there is no number of {field!r} in the train split")
        mean = total / count
        deviation = math.sqrt(max(squares / count - mean**2, 0))
        require(deviation > 0, f"all numbers of {field!r} in the training data are {mean}: there is nothing to learn")
        return cls(float(mean), deviation)

    def __call__(self, values: np.ndarray) -> Float[np.ndarray, "L 1"]:
        return ((values[:, None] - self.mean) / self.deviation).astype(np.float32)


def byte_ids(data: bytes | np.ndarray) -> np.ndarray:
    """Bytes as ids 1..256."""
    return np.frombuffer(data, np.uint8).astype(np.int32) + 1


def byte_symbol(number: int) -> str:
    """The byte of an id: itself where ASCII prints it, else a dot; a newline is seen and kept."""
    character = chr(number - 1) if number else "∅"
    return "↵\n" if character == "\n" else character if number == 0 or " " <= character <= "~" else "·"


def within(config: Any, low: int, high: int, *fields: str) -> None:
    """Raises ValueError for a field of a config outside low..high."""
    for field in fields:
        value = getattr(config, field)
        if value < low:
            raise ValueError(f"{field}={value}: must be at least {low}")
        if value > high:
            raise ValueError(f"{field}={value}: must be at most {high}")


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
