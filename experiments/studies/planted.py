"""Dictionaries of planted atoms: sums of one to six of 96 random unit vectors in 32 dimensions, by every selection.

What is true is known here: which atoms there are, and how many of them a row has.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from configs.interp import dictionary as recipe
from experiments.common.config import to_dataclass
from experiments.tasks.activations import Config, Task
from experiments.training.metrics import plain
from experiments.training.optimizers import OptimizerConfig, make_optimizer
from experiments.training.step import StepFunctions
from seqboat.interp.dictionaries import Atoms, health
from seqboat.models.dictionary import Dictionary, DictionaryConfig, atoms

# Selections with their own fields; several of one selection are a front of error against features a row.
ARMS: tuple[dict[str, Any], ...] = (
    *({"select": "relu", "sparsity": penalty} for penalty in (0.1, 0.3, 1.0)),
    *({"select": "top_k", "k": k} for k in (2, 4, 8)),
    *({"select": "batch_top_k", "k": k} for k in (2, 4, 8)),
    *({"select": "norm", "norm_matching": penalty} for penalty in (0.0, 1 / 32)),
)
RECOVERED = 0.9  # the cosine of an atom and the learned one nearest to it


@dataclasses.dataclass(frozen=True)
class Planted:
    """Batches of `rows` sums of 1 to `most` of `atoms` unit vectors of `width` channels, their sizes uniform in
    0.5 to 1.5: an `experiments.tasks.activations.Source`."""

    splits: ClassVar[tuple[str, ...]] = ("validation",)
    fingerprint: ClassVar[dict[str, str]] = {}
    seed: int
    width: int = 32
    atoms: int = 96
    most: int = 6
    positions: int = 1024

    @property
    def config(self) -> Config:
        return Config(width=self.width, rows="all", evaluation_batches=4)

    @property
    def directions(self) -> np.ndarray:
        """The atoms (F, W)."""
        rows = np.random.default_rng((self.seed, 0)).normal(size=(self.atoms, self.width))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def features(self, split: str, batch: int) -> np.ndarray:
        """What the rows of a batch are made of, (N, F)."""
        rng = np.random.default_rng((self.seed, 1 + (split == "train"), batch))
        rank = rng.random((self.positions, self.atoms)).argsort(1)
        active = rank < rng.integers(1, self.most + 1, (self.positions, 1))
        return (active * rng.uniform(0.5, 1.5, active.shape)).astype(np.float32)

    def rows(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate([self.features(split, batch) for batch in range(first, first + count)]) @ self.directions
        return x, x


def fit(source: Any, config: DictionaryConfig, seed: int, steps: int) -> Atoms:
    """A dictionary or transcoder of the rows of a source, by the recipe of configs/interp/dictionary.py."""
    values = recipe.get_config()
    optimizer = to_dataclass(OptimizerConfig, values.optimizer.to_dict(), "config.optimizer")
    task = Task(source, batch_size=values.train.batch_size, seed=seed)
    functions = StepFunctions(
        Dictionary(config),
        task.loss,
        lambda params: make_optimizer(optimizer, steps, params),
        task.train_batch(0),
    )
    state, train = jax.jit(functions.init)(seed), jax.jit(functions.train, donate_argnums=0)
    for step in range(steps):
        state = train(state, task.train_batch(step), seed)
    return atoms({"params": state.params, "batch_stats": state.batch_stats}, config)


def measure(source: Any, arm: Mapping[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Trains one dictionary with as many features as atoms, and compares it with the truth on held-out rows.
    `correlation` is that of the number of features of a row with the true one, None for a selection that keeps as many
    in every row."""
    config = DictionaryConfig(width=source.width, target_width=None, size=source.atoms, **arm)
    found = fit(source, config, seed, steps)
    truth = np.concatenate([source.features("validation", batch) for batch in range(source.config.evaluation_batches)])
    x = truth @ source.directions
    about = jax.jit(health)(found, x)
    counts = np.asarray((jax.jit(found.encode)(x) > 0).sum(1)), (truth > 0).sum(1)
    varies = min(count.std() for count in counts) > 0
    cosines = np.abs(source.directions @ np.asarray(found.decoder).T).max(1)
    told = {name: getattr(about, name) for name in ("nmse", "l0", "dead", "coherence", "deviation")}
    told |= {"recovered": (cosines >= RECOVERED).mean(), "correlation": np.corrcoef(*counts)[0, 1] if varies else None}
    return {"seed": seed, **arm, **{name: None if value is None else plain(value) for name, value in told.items()}}
