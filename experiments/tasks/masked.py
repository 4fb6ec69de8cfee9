"""A task around a task: reconstruct the elements of its inputs that are masked, without its labels.

Of a sequence of n elements, floor(share * n) are masked, in spans of `span` neighbours, the last of them shorter. Masks
are a function of the seed and the step in training. In an evaluation they are the same at every step and of every run.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from experiments.common.config import to_dataclass, within
from experiments.common.errors import UserError
from experiments.common.plugs import find
from experiments.data.loader import HostShard
from experiments.data.sources import Batch
from experiments.tasks import base
from experiments.tasks.base import MAX_SIZE, Scalar, Sums

# Folded into the seed, so that masks are independent of the order of examples.
MASKS = 1_000_033


@dataclass(frozen=True)
class Config:
    """`of` is a group as config.task, whose inputs are masked: a `share` of the elements, in spans of `span`."""

    of: dict
    share: float = 0.5
    span: int = 4

    def __post_init__(self):
        within(self, 1, MAX_SIZE, "span")
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share}: must be above 0 and below 1")

    @functools.cached_property
    def inner(self) -> tuple[Any, Any]:
        """The module of the task, and its config. Raises UserError."""
        fields = dict(self.of)
        name = fields.pop("name", None)
        module = find("experiments.tasks", name, "config.task.of.name", "Config", "Task")
        return module, to_dataclass(module.Config, fields, "config.task.of")

    @property
    def vocabulary_size(self) -> int | None:
        return self.inner[1].vocabulary_size

    @property
    def channels(self) -> int | None:
        """Of inputs that are numbers: those of the task, and the mask."""
        return None if self.vocabulary_size is not None else self.inner[1].channels + 1


class Task(base.Task):
    """Batches of `inputs` (B, L, 2) int32 or (B, L, F + 1) float32, those of the task with the mask as last column;
    `targets` (B, L) or (B, L, F), what is there; `weights` (B, L), the mask; `lengths` (B,).

    The loss of an element is its cross-entropy, or the mean of its F squared errors.
    """

    selection_metric = "loss"
    higher_is_better = False
    baseline_name = "the frequencies, or the mean, of what is masked"

    def __init__(
        self,
        config: Config,
        *,
        data_dir: str | None,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        module, inner = config.inner
        refuse(config, module)
        batching = {"seed": seed, "process_index": process_index, "process_count": process_count}
        self.task = module.Task(inner, data_dir=data_dir, batch_size=batch_size, **batching)
        self.config, self.splits, self.fixed_data = config, self.task.splits, self.task.fixed_data
        self._seed, self._rows = seed, HostShard(batch_size, process_index, process_count)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.task.fingerprint

    @property
    def of_data(self) -> str:
        return self.task.of_data

    def example(self) -> Batch:
        return self.train_batch(0)

    def train_batch(self, step: int) -> Batch:
        return self._masked(self.task.train_batch(step), self._rng(step))

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.task.train_batches(start_step), start_step):
            yield self._masked(batch, self._rng(step))

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        rng = np.random.default_rng(MASKS)  # one for all batches: an example's mask is the same at any batch size
        return (self._masked(batch, rng) for batch in self.task.evaluation_batches(split))

    def loss(self, output: Any, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        weights, targets = batch["weights"], batch["targets"]
        weight_sum = weights.sum()
        if self.config.vocabulary_size is None:
            loss_sum = (weights * jnp.square(output.logits - targets).mean(-1)).sum()
            return loss_sum, weight_sum, {"loss": (loss_sum, weight_sum)}
        return super().loss(output, batch)

    def baseline(self, split: str) -> dict[str, float]:
        """The loss of one answer for all masked elements of the split, the best one."""
        masked = [batch["targets"][batch["weights"] > 0] for batch in self.evaluation_batches(split)]
        targets = np.concatenate(masked)
        if self.config.vocabulary_size is None:
            return {"loss": float(targets.var(0).mean())}
        share = np.bincount(targets) / len(targets)
        return {"loss": float(-(share[share > 0] * np.log(share[share > 0])).sum()), "accuracy": float(share.max())}

    def symbol(self, number: int) -> str:
        return self.task.symbol(number)

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((MASKS, self._seed, step))

    def _masked(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """The batch of the task, masked by scores that are drawn for the rows of all processes."""
        inputs, lengths = batch["inputs"], batch["lengths"]
        scores = rng.random((self._rows.batch_size, -(-inputs.shape[1] // self.config.span)))
        chosen = self._rows.cut(np.arange(self._rows.batch_size))
        mask = draw_mask(scores[chosen], lengths, inputs.shape[1], self.config)
        column = mask[..., None].astype(inputs.dtype)
        both = np.concatenate([inputs if inputs.ndim > 2 else inputs[..., None], column], -1)
        return {"inputs": both, "targets": inputs, "weights": mask.astype(np.float32), "lengths": lengths}


def draw_mask(scores: np.ndarray, lengths: np.ndarray, length: int, config: Config) -> Bool[np.ndarray, "B L"]:
    """Masks spans in the order of their scores (B, spans), until enough elements of each sequence are masked."""
    position = np.arange(length)
    keys = np.where(position < lengths[:, None], scores[:, position // config.span], np.inf)
    order = np.argsort(keys, axis=1, kind="stable")  # elements of a span have one score, and stay together
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(position, order.shape), 1)
    counts = [math.floor(config.share * int(n)) for n in lengths]
    return rank < np.array(counts)[:, None]


def refuse(config: Config, module: Any) -> None:
    """Raises UserError for a task that cannot be masked."""
    name, inner = config.of["name"], config.inner[1]
    where = f"config.task.of.name={name!r}"
    if name in ("masked", "activations"):
        raise UserError(f"{where}: cannot be masked; name a task of sequences of symbols or numbers")
    if name == "retrieval":
        raise UserError(f"{where}: its inputs are pairs of documents; name a task of single ones, as text")
    if getattr(inner, "carry_state", False):
        raise UserError("config.task.of.carry_state=True: must be False, masked elements are seen from both sides")
