"""How generated weights depend on the hyper-input: diagnostics for a hypernetwork that does not train."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from seqboat.hyper.network import Hyper
from seqboat.hyper.spec import real
from seqboat.paths import flatten


class Diagnosis(NamedTuple):
    """Over K hyper-inputs z:

    `slope`: of log std(theta(z)) over log |z|: 1 if weights are proportional to the input; NaN for fewer than two
    distinct norms above 0.
    `spread`: largest over smallest std(theta(z)).
    `rank`: second over first singular value of [theta(z_1) ... theta(z_K)]: 0 if all lie on one ray.
    `std_ratio`: per leaf, the rms of std over z, over the std of its own initializer (`spec(..., draws=64)`).
    `perturbation`: mean of |theta(z) - theta0| / |theta0|; NaN without residual.
    `gradient_variation`: standard deviation over mean of the gradient's norm over z; NaN without a loss.
    """

    slope: float
    spread: float
    rank: float
    std_ratio: dict[str, float]
    perturbation: float
    gradient_variation: float


def diagnose(
    model: Hyper,
    variables: dict[str, Any],
    conditions: Num[Array, "K M"],
    loss: Callable[[dict[str, Any], Array], Array] | None = None,
) -> Diagnosis:
    """`loss(variables, condition)` is a scalar on fixed data, since batch noise would hide the effect of z."""
    params = variables["params"]
    others = {name: tree for name, tree in variables.items() if name != "params"}
    for condition in conditions:
        model.network.config.encoding.check(condition)
    one = lambda condition: model.apply(variables, condition, method="generate")
    every = flatten(jax.jit(jax.vmap(one))(jnp.asarray(conditions)))
    theta = {leaf.path: np.asarray(real(every[leaf.path]), np.float64) for leaf in model.network.spec}
    rows = np.concatenate([leaf.reshape(len(conditions), -1) for leaf in theta.values()], 1)
    std = rows.std(1)
    singular = np.linalg.svd(rows, compute_uv=False)
    variation = perturbation = float("nan")
    if model.network.config.residual:
        stored = flatten(params["target"])
        base = np.concatenate([np.asarray(real(stored[path]), np.float64).reshape(-1) for path in theta])
        perturbation = float(np.mean(np.linalg.norm(rows - base, axis=1)) / np.linalg.norm(base))
    if loss is not None:
        gradient = jax.grad(lambda params, z: loss({"params": params, **others}, z))
        norm = lambda z: jnp.sqrt(sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.tree.leaves(gradient(params, z))))
        norms = np.asarray(
            jax.jit(lambda conditions: jax.lax.map(norm, conditions))(jnp.asarray(conditions)), np.float64
        )
        variation = float(norms.std() / norms.mean())
    measured = {leaf.path: leaf.variance for leaf in model.network.spec if leaf.variance}
    return Diagnosis(
        slope=_slope(np.linalg.norm(np.asarray(conditions, np.float64), axis=1), std),
        spread=float(std.max() / std.min()) if std.min() > 0 else float("inf"),
        rank=float(singular[1] / singular[0]) if len(singular) > 1 else float("nan"),
        std_ratio={
            path: float(np.sqrt(np.mean(np.var(theta[path].reshape(len(conditions), -1), axis=1)) / variance))
            for path, variance in measured.items()
        },
        perturbation=perturbation,
        gradient_variation=variation,
    )


def _slope(size: np.ndarray, std: np.ndarray) -> float:
    known = (size > 0) & (std > 0)
    if len(set(size[known])) < 2:
        return float("nan")
    return float(np.polyfit(np.log(size[known]), np.log(std[known]), 1)[0])
