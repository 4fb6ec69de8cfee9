"""Continual learning without forgetting: a penalty on changes of the weights generated for previous tasks.

von Oswald et al. 2020 (arXiv 1906.00695), equation 2:

    L(theta, t) = L_task(h(e_t; theta)) + beta / (t - 1) sum_{t' < t} |h(e_t'; theta) - h(e*_t'; theta*)|^2

with theta*, e* from before task t. Weighting each generated number by its importance F for a task's loss gives
sum_p F_p (Delta W_p)^2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.hyper.network import Hyper, HyperNetwork


def generate_tasks(model: Hyper, variables: dict[str, Any], tasks: Array) -> Any:
    """All parameters of the target for each of T hyper-inputs (T, M); leaves have a leading axis of T."""
    return jax.vmap(lambda condition: model.apply(variables, condition, method="generate"))(tasks)


def drift(now: Any, before: Any, importance: Any = None) -> Float[Array, ""]:
    """The mean over tasks of sum_p F_p (now_p - before_p)^2, for trees whose leaves have a leading axis of tasks.

    `importance` is F, with the same structure; None is 1 everywhere.
    """
    change = jax.tree.map(lambda a, b: jnp.square(jnp.abs(a - b)), now, before)
    if importance is not None:
        change = jax.tree.map(jnp.multiply, importance, change)
    tasks = jax.tree.leaves(now)[0].shape[0]
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(change)) / tasks


def importance(gradient: Callable[[Any, Any], Any], params: Any, examples: Any) -> Any:
    """The diagonal of the empirical Fisher information of a target's parameters, scaled to mean 1 over all parameters.

    F_p = mean over examples of g_p^2,  g = `gradient(params, example)`; leaves of `examples` have a leading axis of
    examples.
    """
    squares = jax.lax.map(
        lambda example: jax.tree.map(lambda g: jnp.square(jnp.abs(g)), gradient(params, example)), examples
    )
    fisher = jax.tree.map(lambda a: a.mean(0), squares)
    size = sum(leaf.size for leaf in jax.tree.leaves(fisher))
    mean = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(fisher)) / size
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny), fisher)


def grow(network: HyperNetwork, params: dict[str, Any], units: int, key: Array) -> tuple[HyperNetwork, dict[str, Any]]:
    """The network and its parameters with `units` more units in the LSTM of its recurrent head, and unchanged output.

    New units read everything, but their outgoing weights start at zero, and are learned. `params` are those of the
    `HyperNetwork`. Raises ValueError for one without a recurrent head, and for units below 1.
    """
    if set(network.groups()) != {"recurrent"}:
        raise ValueError(
            f"only a network with recurrent heads only can grow; this one has {', '.join(network.groups())}"
        )
    if "recurrent" not in params:
        raise ValueError("params must be the HyperNetwork's own: variables['params']['network'] of a Hyper")
    if units < 1:
        raise ValueError(f"units={units}: must be at least 1")
    config = network.config
    grown = dataclasses.replace(config, hidden=(*config.hidden[:-1], config.hidden[-1] + units))
    larger = network.clone(config=grown)
    old, new = params["recurrent"], larger.init(key, jnp.zeros(config.encoding.inputs))["params"]["recurrent"]
    width = config.hidden[-1]

    def widen(path, fresh, kept):
        to_new_units = path[0].key == "lstm"
        fresh = fresh if to_new_units else jnp.zeros_like(fresh)
        if to_new_units and path[1].key.startswith("h") and fresh.ndim == 2:
            fresh = fresh.at[width:, :width].set(0)  # from new units to old ones
        return fresh.at[tuple(slice(size) for size in kept.shape)].set(kept)

    return larger, {**params, "recurrent": jax.tree_util.tree_map_with_path(widen, new, old)}
