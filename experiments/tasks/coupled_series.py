"""A series of many channels that are coupled in groups, with anomalies in its test part: made here, so that the graph
and the anomalies are known.

Every group has a signal g, an oscillation of a random period that drifts, and channel c of it is

    x_c(t) = sqrt(coupling) g(t) + sqrt(1 - coupling) e_c(t),    e white,    of variance 1

The parts of the series follow each other: training, validation, test. Anomalies are spans of the test part in half of
the channels of one group. In a "shift" a constant is added. In an "uncoupled" one every channel has an oscillation of
its own in place of g: each by itself looks as before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.common.config import at_most, within
from experiments.tasks import base
from experiments.tasks.base import MAX_DRAWN, Scalar, Sums
from seqboat.interp.circuits import auc
from seqboat.models.stackvae import disagreement

KINDS = ("shift", "uncoupled")
WINDOW_ORDER = 1_000_039  # the seed of the order of windows in an evaluation
# Oscillations: x_t = 2 r cos(2 pi / period) x_{t-1} - r^2 x_{t-2} + noise, from a start that is left out.
RADIUS, PERIODS, START = 0.97, (10.0, 40.0), 500


@dataclass(frozen=True)
class Config:
    """Windows of `length` elements of a series of `channels` in `groups` of equal size, and its parts' elements. The
    test part has `anomalies` spans of `span` elements, of the two kinds in turn; `shift` is in standard deviations."""

    vocabulary_size: ClassVar[None] = None
    channels: int = 24
    groups: int = 4
    length: int = 32
    coupling: float = 0.7
    train_elements: int = 8192
    validation_elements: int = 2048
    test_elements: int = 4096
    anomalies: int = 32
    span: int = 16
    shift: float = 2.0
    data_seed: int = at_most(2**63 - 1, default=0)

    def __post_init__(self):
        within(self, 2, 1024, "channels")
        within(self, 1, self.channels // 2, "groups")
        if self.channels % self.groups:
            raise ValueError(f"groups={self.groups}: must divide the {self.channels} channels")
        within(self, 1, 2**16, "length")
        for field in ("train_elements", "validation_elements", "test_elements"):
            within(self, self.length + 1, MAX_DRAWN // (4 * self.channels), field)
        if not 0 < self.coupling <= 1:
            raise ValueError(f"coupling={self.coupling}: must be above 0 and at most 1")
        within(self, len(KINDS), self.test_elements, "anomalies")
        within(self, 1, self.test_elements // (2 * self.anomalies), "span")
        if self.data_seed < 0:
            raise ValueError(f"data_seed={self.data_seed}: must not be negative")


class Series(NamedTuple):
    """`parts` (T, C) float32 by split; `kinds` (T,) int32 of the test part, 0 at a normal element, else from 1 on;
    `groups` (C,), the group of every channel. None where they are not known."""

    parts: dict[str, Any]
    kinds: Int[np.ndarray, " T"] | None
    groups: Int[np.ndarray, " C"] | None


class Windows:
    """The windows of `length` elements of a part, one for each place where it may end, in the given order of ends."""

    def __init__(self, x: Float[np.ndarray, "T C"], kinds: Int[np.ndarray, " T"] | None, length: int, ends: np.ndarray):
        self._x, self._kinds, self._length, self._ends = x, kinds, length, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        end = int(self._ends[index])
        own = slice(end + 1 - self._length, end + 1)
        return {"inputs": self._x[own]} | ({} if self._kinds is None else {"anomalies": self._kinds[own]})


class SeriesTask(base.Task):
    """Batches of `inputs` and `targets` (B, W, C) float32, `weights` (B, W), `lengths` (B,); those of the test split
    also have `anomalies` (B, W) int32, the kinds, if they are known.

    The loss of an element is the mean of its C squared errors. An evaluation scores the last element of every window.
    `auroc` is the probability that the score of an anomalous element is above that of a normal one, `auroc_KIND` that
    of a kind, by all pairs within a batch; the score is the loss. Windows are in a random order, the same in every run,
    so that a batch has them from all of the series. For a model with a graph of channels, `neighbour_auroc` is that of
    another score, what the channels differ from the mean of their neighbours by (`seqboat.models.stackvae`), and
    `edge_auroc` that of the weights of the graph, if groups are known: of two channels of a group, and of two of
    different groups.
    """

    selection_metric = "loss"
    higher_is_better = False
    baseline_name = "means and correlations of channels"

    kinds: tuple[str, ...] = ()  # the names of the kinds of anomalies, for each of which evaluation reports an area

    def __init__(self, config: Any, series: Series, **batching: int):
        """`config` has the `length` of windows and the `channels`."""
        self.series = series
        order = np.random.default_rng(WINDOW_ORDER)
        sources = {}
        for split, x in series.parts.items():
            ends = np.arange(config.length - 1, len(x))
            kinds = series.kinds if split == "test" else None
            sources[split] = Windows(x, kinds, config.length, ends if split == "train" else order.permutation(ends))
        super().__init__(config, sources, **batching)

    def row(self, example: dict[str, np.ndarray]) -> dict[str, Any]:
        length = self.config.length
        weights = np.ones(length, np.float32)
        return {**example, "targets": example["inputs"], "weights": weights, "lengths": np.int32(length)}

    @property
    def coupled(self) -> Bool[np.ndarray, "C C"] | None:
        """Which channels are of one group; None if that is not known."""
        return None if self.series.groups is None else self.series.groups[:, None] == self.series.groups[None]

    def loss(self, output: Any, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        weights = batch["weights"]
        total, weight = (weights * _errors(output, batch)).sum(), weights.sum()
        return total, weight, {"loss": (total, weight)}

    def evaluation_metrics(self, output: Any, batch: Mapping[str, Array]) -> Sums:
        found: Sums = {}
        if hasattr(output, "adjacency") and self.coupled is not None:
            found["edge_auroc"] = pairs_in_order(*_off_diagonal(output.adjacency[0], self.coupled))
        if "anomalies" in batch:
            real = batch["weights"][:, -1] > 0
            kinds = jnp.where(real, batch["anomalies"][:, -1], -1)
            scores = {"auroc": _errors(output, batch)[:, -1]}
            if hasattr(output, "adjacency"):
                scores["neighbour_auroc"] = disagreement(output.adjacency[0], batch["targets"][:, -1]).sum(-1)
            for name, score in scores.items():
                found[name] = pairs_in_order(score, kinds > 0, kinds == 0)
                for number, kind in enumerate(self.kinds, 1):
                    found[f"{name}_{kind}"] = pairs_in_order(score, kinds == number, kinds == 0)
        return found

    def baseline(self, split: str) -> dict[str, float]:
        """The loss of the mean; for anomalies the area of x^T K^-1 x, with K the correlation of the channels in
        training; for edges that of |K|."""
        self._check(split)
        x, k = self.series.parts[split], np.corrcoef(self.series.parts["train"].T)
        found = {"loss": float(np.square(x).mean())}
        if self.coupled is not None:
            weight, together = _off_diagonal(np.abs(k), self.coupled)[:2]
            found["edge_auroc"] = auc(weight, together)
        if split == "test" and self.series.kinds is not None:
            scored = slice(self.config.length - 1, None)
            distance, kinds = (x @ np.linalg.pinv(k) * x).sum(1)[scored], self.series.kinds[scored]
            wanted = {"auroc": kinds > 0} | {f"auroc_{kind}": kinds == n for n, kind in enumerate(self.kinds, 1)}
            for name, anomalous in wanted.items():
                if anomalous.any() and (kinds == 0).any():
                    own = anomalous | (kinds == 0)
                    found[name] = auc(distance[own], anomalous[own])
        return found


class Task(SeriesTask):
    kinds = KINDS

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task. Reads no files."""
        super().__init__(config, make(config), **batching)


def pairs_in_order(
    score: Float[Array, " N"], positive: Bool[Array, " N"], negative: Bool[Array, " N"]
) -> tuple[Scalar, Scalar]:
    """How many pairs of a positive and a negative are in order, ties counted half, and how many pairs there are: their
    ratio is the area under the ROC curve."""
    above = (score[:, None] > score[None]) + 0.5 * (score[:, None] == score[None])
    pairs = positive[:, None] & negative[None]
    return jnp.where(pairs, above, 0.0).sum(), pairs.sum().astype(jnp.float32)


def make(config: Config) -> Series:
    """The series of a config: in units of the standard deviation of every channel in training."""
    rng = np.random.default_rng(config.data_seed)
    sizes = {split: getattr(config, f"{split}_elements") for split in ("train", "validation", "test")}
    total, first = sum(sizes.values()), sizes["train"] + sizes["validation"]
    groups = rng.permutation(np.arange(config.channels) % config.groups)
    periods = rng.uniform(*PERIODS, config.groups)
    common = oscillations(rng, periods, total)[:, groups]
    alone = oscillations(rng, periods[groups], total)
    kinds, shifted, uncoupled = _plant(rng, config, groups)
    common[first:] = np.where(uncoupled, alone[first:], common[first:])
    noise = rng.standard_normal((total, config.channels))
    x = np.sqrt(config.coupling) * common + np.sqrt(1 - config.coupling) * noise
    x = (x - x[: sizes["train"]].mean(0)) / x[: sizes["train"]].std(0)
    x[first:] += config.shift * shifted
    parts = np.split(x.astype(np.float32), [sizes["train"], first])
    return Series(dict(zip(sizes, parts, strict=True)), kinds, groups.astype(np.int32))


def oscillations(rng: np.random.Generator, periods: Float[np.ndarray, " N"], total: int) -> Float[np.ndarray, "T N"]:
    """Independent ones of variance 1, that of an autoregression of order 2."""
    noise = rng.standard_normal((START + total, len(periods)))
    first, second = 2 * RADIUS * np.cos(2 * np.pi / periods), -(RADIUS**2)
    noise *= np.sqrt((1 + second) * ((1 - second) ** 2 - first**2) / (1 - second))
    x = np.zeros((2 + len(noise), len(periods)))
    for t, drawn in enumerate(noise, 2):
        x[t] = first * x[t - 1] + second * x[t - 2] + drawn
    return x[-total:]


def _plant(rng: np.random.Generator, config: Config, groups: Int[np.ndarray, " C"]) -> tuple[Any, Any, Any]:
    """Of every element of the test part the kind (T,), and of every number whether it is shifted, or uncoupled (T, C).
    Every anomaly has an equal part of the series to be in."""
    kinds = np.zeros(config.test_elements, np.int32)
    marks = np.zeros((len(KINDS), config.test_elements, config.channels), bool)
    room = config.test_elements // config.anomalies
    for number in range(config.anomalies):
        kind, begin = number % len(KINDS), number * room + rng.integers(room - config.span + 1)
        members = np.flatnonzero(groups == rng.integers(config.groups))
        channels = rng.permutation(members)[: len(members) // 2]
        own = slice(begin, begin + config.span)
        kinds[own] = 1 + kind
        marks[kind, own, channels[:, None]] = True
    return kinds, marks[0], marks[1]


def _errors(output: Any, batch: Mapping[str, Array]) -> Float[Array, "B W"]:
    return jnp.square(output.logits - batch["targets"]).mean(-1)


def _off_diagonal(weights: Any, together: Bool[np.ndarray, "C C"]) -> tuple[Any, Any, Any]:
    """Of all ordered pairs of channels the weight, whether they are together, and whether not."""
    pairs = np.nonzero(~np.eye(len(together), dtype=bool))
    return weights[pairs], together[pairs], ~together[pairs]
