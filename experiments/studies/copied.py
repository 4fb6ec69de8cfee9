"""Where the features of attention's output come from, on selective copying: at the i-th query, the source is known.

At every active query, the strongest feature of a dictionary of `gated` is split among the elements that attention reads
(`experiments.evaluation.attention`); negative terms are left out, and the rest is taken as shares.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.synthetic import selective_copy as recipe
from experiments.evaluation import attention
from experiments.evaluation.seeds import train_whole
from experiments.tasks.selective_copy import FIRST_SYMBOL
from experiments.training.experiment import build
from experiments.training.restore import Run, load
from seqboat.interp.dictionaries import Atoms

SPLIT, BATCHES = "test", 8


def model(seed: int, directory: Path, changes: Mapping[str, Any]) -> Run:
    """Selective copying from a seed at its last step; `changes` are differences from the recipe."""
    config = recipe.get_config("credit_router")
    config.update_from_flattened_dict(dict(changes))
    config.seed = seed
    train_whole(build(config.to_dict()), directory / "copy", f"copy of seed {seed}")
    return load(directory / "copy", config.train.steps)


def measure(run: Run, layer: int, atoms: Atoms) -> dict[str, float]:
    """Means over the first BATCHES of a split: the share of `queries` that are active and have a feature, and of these
    the share of the terms that is of the `right` symbol and of all `other` symbols, the share of queries with more than
    half at the right one, `most`, and the weight that `attention` gives it."""
    batches = list(itertools.islice(run.task.evaluation_batches(SPLIT), BATCHES))
    taken = attention.take(run, layer, [(batch, len(batch["inputs"])) for batch in batches])
    inputs = np.concatenate([batch["inputs"] for batch in batches])
    length, symbols = run.task.config.length, run.task.config.symbols
    f = np.asarray(jax.jit(Atoms.encode)(atoms, taken.gated))[:, length:]
    found = taken.active[:, length:] & (f > 0).any(-1)
    sequence, query = np.nonzero(found)
    strongest = f[sequence, query].argmax(-1)
    terms = attention.BySource(run, layer, taken)(np.asarray(atoms.encoder).T[strongest], sequence, length + query)
    places = np.argsort(inputs[:, :length] < FIRST_SYMBOL, axis=1, kind="stable")[:, :symbols][sequence]
    positive = np.maximum(terms.terms, 0)
    shares = np.take_along_axis(positive / np.maximum(positive.sum(1, keepdims=True), 1e-30), places, 1)
    right = shares[np.arange(len(query)), query]
    weight = np.take_along_axis(terms.weights, places, 1)[np.arange(len(query)), query]
    mean = lambda values: float(values.mean()) if len(values) else 0.0
    return {
        "queries": float(found.mean()),
        "right": mean(right),
        "other": mean(shares.sum(1) - right),
        "most": mean(right > 0.5),
        "attention": mean(weight),
    }
