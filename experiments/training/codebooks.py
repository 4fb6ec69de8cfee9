"""Codebooks that start from a trained run: its parameters, and k-means of its own values."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.errors import UserError
from experiments.training.saved_arrays import tree_differences
from experiments.training.step import apply
from seqboat.interp.codebooks import kmeans
from seqboat.layers import taps

# Of training batches that k-means reads: at least as many rows for each code.
ROWS_PER_CODE = 16
# Folded into the seed.
CLUSTERS = 2**32 - 2


def start(experiment: Any, run: Any) -> dict[str, Any]:
    """Parameters and batch statistics of an experiment with `config.codebook` from a run of its target alone.

    Raises UserError for a run of another model, and if a site has fewer values than codes.
    """
    variables = jax.eval_shape(lambda: experiment.functions.variables(experiment.config.seed))
    plain = {name: tree.get("target", {}) for name, tree in variables.items()}
    if differences := tree_differences(run.variables, plain, partial=False):
        raise UserError(f"--init_from={run.origin} is a run of another model than config.model: {differences[0]}")
    shapes = variables["params"]["codebooks"]
    tables = {
        site: _tables(rows, shapes[site].shape, experiment.config) for site, rows in _rows(experiment, run).items()
    }
    stats = {"target": run.variables["batch_stats"]} if variables["batch_stats"] else {}
    return {"params": {"target": run.variables["params"], "codebooks": tables}, "batch_stats": stats}


def _rows(experiment: Any, run: Any) -> dict[str, list[np.ndarray]]:
    """The values (N, W) of every layer at every site, of the first training batches."""
    config, task = experiment.config.codebook, experiment.task
    layer = run.model.config.encoder.layer

    @jax.jit
    def look(variables: Any, batch: Mapping[str, Any]) -> Any:
        found = apply(run.model, variables, batch, False, ("taps",))[1]["taps"]
        there = {site: taps.computed(found, layer, site, batch["lengths"]) for site in config.sites}
        return {site: (taps.read(found, site).astype(jnp.float32), there[site]) for site in config.sites}

    first = task.train_batch(0)
    count = -(-ROWS_PER_CODE * config.codes // max(int(first["lengths"].sum()), 1))
    parts: dict[str, list[list[np.ndarray]]] = {site: [] for site in config.sites}
    for step in range(count):
        found = jax.device_get(look(run.variables, task.train_batch(step)))
        for site, (values, there) in found.items():
            parts[site].append(
                [value[mask].reshape(-1, value.shape[-1]) for value, mask in zip(values, there, strict=True)]
            )
    return {site: [np.concatenate(rows) for rows in zip(*each, strict=True)] for site, each in parts.items()}


def _tables(rows: list[np.ndarray], shape: tuple[int, ...], config: Any) -> jax.Array:
    """k-means of every group of channels of every layer, over k, so that the sum of k alike codes is their mean."""
    _, groups, codes, _ = shape
    key = jax.random.fold_in(jax.random.key(config.seed), CLUSTERS)
    for layer, values in enumerate(rows, 1):
        if len(values) < codes:
            raise UserError(f"config.codebook.codes={codes}: layer {layer} has {len(values)} values to start from")
    each = [[kmeans(jnp.asarray(part), codes, key) for part in np.split(values, groups, axis=1)] for values in rows]
    return jnp.stack([jnp.stack(parts) for parts in each]) / config.codebook.k
