"""How signals and small differences of them grow from layer to layer of a real network: what `criticality` predicts
for layers that are alike, without gates, attention or mixers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Growth(NamedTuple):
    """Of the input and of S layers' outputs: their `mean_square` (S + 1,); `growth` (S,), by which the mean square of a
    small difference is multiplied from each to the next."""

    mean_square: Float[Array, "states"]
    growth: Float[Array, "steps"]


def growth(
    states: Callable[[Array], Sequence[Array]],
    x: Float[Array, "... D"],
    valid: Bool[Array, "..."],
    key: Array,
    size: float = 1e-3,
) -> Growth:
    """`states(x)` gives every layer's output (..., E). The difference is random in every number of x, and `size` times
    its root mean square. What is not `valid` counts nowhere.

    It is finite, so a router that decides otherwise for one of the inputs is part of the growth.
    """

    def mean_square(y: Array) -> Array:
        y = jnp.where(valid[..., None], y.astype(jnp.float32), 0)
        return jnp.square(y).sum() / jnp.maximum(valid.sum() * y.shape[-1], 1)

    first = mean_square(x)
    noise = valid[..., None] * jax.random.normal(key, x.shape) * size * jnp.sqrt(first)
    moved = (x + noise).astype(x.dtype)
    pairs = list(zip((x, *states(x)), (moved, *states(moved)), strict=True))
    difference = jnp.stack([mean_square(b.astype(jnp.float32) - a.astype(jnp.float32)) for a, b in pairs])
    return Growth(jnp.stack([mean_square(a) for a, _ in pairs]), difference[1:] / difference[:-1])
