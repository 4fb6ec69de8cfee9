"""Locates the first value that is not finite."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.training.experiment import Experiment
from experiments.training.step import TrainState, with_streams
from seqboat.paths import path_name

# In order of computation in a layer.
_ORDER = (
    "pre_norm",
    "ssm_out",
    "router_logits",
    "confidence",
    "q",
    "k",
    "v",
    "gate",
    "attended",
    "gau_out",
    "unit_out",
    "skip",
    "resid",
)


def locate(experiment: Experiment, state: TrainState) -> str:
    """Reruns the failed step and names the first value of the first layer, or the parameter gradients, that are not
    finite. `state` holds the parameters before that step."""
    step, parts = int(state.bad_step), experiment.config.train.accumulate
    state = jax.device_get(state)  # gathered from all devices
    batch = jax.tree.map(jnp.asarray, with_streams(experiment.task.train_batch(step), state.streams))
    batch = jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), batch)
    key = jax.random.fold_in(jax.random.key(experiment.config.seed), step)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, part, key):
        return experiment.functions.objective(
            params, state.batch_stats, part, key, 0.0, ("batch_stats", "taps", "terms")
        )

    for index in range(parts):  # in the step's parts, with the same dropout
        part = jax.tree.map(lambda a, index=index: a[index], batch)
        (loss, (_, _, changed)), gradient = run(state.params, part, jax.random.fold_in(key, index))
        found = _first_layer(changed.get("taps", {})) or _loss_or_gradient(loss, gradient)
        if found:
            return found
    return "its loss and gradient are finite; the optimiser's update of the parameters is not"


def _loss_or_gradient(loss: Any, gradient: Any) -> str | None:
    if not bool(jnp.isfinite(loss)):
        return "the values of all layers are finite; the loss is not"
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    bad = [path_name(path) for path, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
    if not bad:
        return None
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    return f"the values of all layers are finite; the gradient is not: {shown}"


def _first_layer(taps: Any) -> str | None:
    """The lowest layer with a value that is not finite, and the first such value; taps are stacked over layers."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(taps):
        name = str(path[-1].key)
        if name in _ORDER:
            finite = jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1)
            found += [(layer, _ORDER.index(name)) for layer in range(leaf.shape[0]) if not bool(finite[layer])]
    if not found:
        return None
    layer, order = min(found)
    return f"first in layer {layer}, in {_ORDER[order]}"
