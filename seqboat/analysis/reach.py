"""How far back a gradient reaches (the decay of Pascanu et al. 2013, arXiv 1211.5063, measured).

    r(tau) = E |d <u, y_T> / d x_{T - tau}| / E |d <u, y_T> / d x_T|

over the sequences of a batch, each with its last element T, and over directions u of its output.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

# The lags, in elements, over which `slope` fits by default.
LAGS = (1, 30)


def reach(
    apply: Callable[[Array], Array],
    x: Float[Array, "B L D"],
    lengths: Int[Array, "B"],
    directions: Float[Array, "N E"],
) -> Float[Array, "L"]:
    """r(tau) for the lags tau = 0..L-1 of `apply`, x (B, L, D) -> y (B, L, E).

    A sequence counts at the lags below its true length, in both means, so padding and empty sequences do not. Where no
    sequence is long enough, and where y_T does not depend on x_T, r is NaN.
    """
    y, transpose = jax.vjp(apply, x)
    lag, last = np.arange(x.shape[1]), jnp.maximum(lengths - 1, 0)
    known = lag[None] < lengths[:, None]

    def norms(direction: Float[Array, "E"]) -> Float[Array, "B L"]:
        at_last = (lag[None] == last[:, None]) & known
        gradient = transpose(jnp.where(at_last[..., None], direction[None, None], 0).astype(y.dtype))[0]
        norm = jnp.sqrt(jnp.square(gradient.astype(jnp.float32)).sum(-1))
        return jnp.take_along_axis(norm, jnp.maximum(last[:, None] - lag[None], 0), axis=1)

    norm = jax.lax.map(norms, directions).sum(0)
    return (norm * known).sum(0) / (norm[:, :1] * known).sum(0)


def slope(r: Float[ArrayLike, "L"], lags: tuple[int, int] = LAGS) -> float:
    """The slope of ln r per element, by least squares over the `lags` first..last at which r is above 0; NaN where
    there are fewer than two."""
    lag = np.arange(lags[0], min(lags[1] + 1, len(np.asarray(r))))
    values = np.asarray(r, np.float64)[lag]
    fine = values > 0
    return float(np.polyfit(lag[fine], np.log(values[fine]), 1)[0]) if fine.sum() > 1 else float("nan")


def horizon(r: Float[ArrayLike, "L"], share: float = 0.01) -> int:
    """The largest lag, in elements, at which r is at least `share`."""
    return int(np.flatnonzero(np.asarray(r) >= share).max(initial=0))
