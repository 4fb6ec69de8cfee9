"""Which initial values keep signals alive through a deep network (Roberts, Yaida and Hanin 2021, arXiv 2106.10165,
chapter 5): wide layers z -> W f(z) + b with weights of variance C_W / width and biases of variance C_b.

Activations are functions of one number, in jax. Everything is computed in float64.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

Activation = Callable[[Any], Any]

# Standard deviations at which Gaussian integrals end, and nodes on each side of 0.
END, NODES = 12.0, 200
# Kernels between which a critical one is looked for, on a grid, and how often the grid is made finer.
KERNELS = (1e-2, 1e3)
GRID, ROUNDS = 26, 10


class Critical(NamedTuple):
    """A critical initialisation: at `kernel` K*, the mean square of z, both susceptibilities are 1.

    "scale-invariant": every kernel stays what it is. "zero": kernels decay slowly, towards K* = 0. "half-stable": K* is
    above 0 and attracts from one side.
    """

    kind: Literal["scale-invariant", "zero", "half-stable"]
    kernel: float
    weight_variance: float
    bias_variance: float


class Averages(NamedTuple):
    """Over z ~ N(0, K): <f^2>, <f^2 (z^2 - K)> and <f'^2>."""

    square: np.ndarray
    moved: np.ndarray
    slope: np.ndarray


def averages(f: Activation, kernel: Float[ArrayLike, "*kernels"]) -> Averages:
    """By Gauss-Legendre on each side of 0: activations have a kink there, at which a rule over both sides at once
    (Gauss-Hermite) converges slowly."""
    node, weight = np.polynomial.legendre.leggauss(NODES)
    node = END / 2 * (node + 1)
    weight = END / 2 * weight * np.exp(-np.square(node) / 2) / np.sqrt(2 * np.pi)
    kernel = np.asarray(kernel, np.float64)[..., None]
    z = np.sqrt(kernel) * np.concatenate([-node, node])
    value, slope = _values(f, z)
    mean = lambda y: y @ np.concatenate([weight, weight])
    return Averages(mean(value**2), mean(value**2 * (z**2 - kernel)), mean(slope**2))


def kernel_step(f: Activation, kernel: float, weight_variance: float, bias_variance: float = 0.0) -> float:
    """The kernel of the next layer: C_b + C_W <f(z)^2>, z ~ N(0, K)."""
    return float(bias_variance + weight_variance * averages(f, kernel).square)


def susceptibilities(f: Activation, kernel: float, weight_variance: float) -> tuple[float, float]:
    """By what a small change of the kernel, and the squared distance of two near inputs, are multiplied in a layer:

    chi_parallel = C_W <f^2 (z^2 - K)> / (2 K^2),    chi_perpendicular = C_W <f'^2>
    """
    found = averages(f, kernel)
    return float(weight_variance * found.moved / (2 * kernel**2)), float(weight_variance * found.slope)


def critical(f: Activation) -> Critical:
    """The critical initialisation of an activation. Raises ValueError if there is none, as for a sigmoid."""
    small, points = 1e-6, np.array([-1.0, -0.3, 0.3, 1.0])
    slopes = _values(f, np.array([-small, small]))[1]
    weight_variance = float(2 / max(np.square(slopes).sum(), small))
    if np.allclose(_values(f, 7 * points)[0], 7 * _values(f, points)[0], rtol=1e-9, atol=0):
        return Critical("scale-invariant", float("nan"), weight_variance, 0.0)
    if abs(_values(f, np.zeros(1))[0][0]) < small and kernel_step(f, 1e-3, weight_variance) < 1e-3:
        return Critical("zero", 0.0, weight_variance, 0.0)
    kernel = _equal(f)
    weight_variance = 1 / float(averages(f, kernel).slope)
    bias_variance = kernel - kernel_step(f, kernel, weight_variance)
    if bias_variance < 0:
        raise ValueError(f"no critical point: at K={kernel:.3g} it would take biases of variance {bias_variance:.3g}")
    return Critical("half-stable", kernel, weight_variance, bias_variance)


def _equal(f: Activation) -> float:
    """The smallest kernel at which both susceptibilities are equal. Raises ValueError if there is none."""
    grid = np.geomspace(*KERNELS, GRID)
    for _ in range(ROUNDS):
        found = averages(f, grid)
        above = found.moved / (2 * grid**2) > found.slope
        changes = np.flatnonzero(above[1:] != above[:-1])
        if not len(changes):
            raise ValueError(f"no critical point with a kernel in {KERNELS[0]:g}..{KERNELS[1]:g}")
        grid = np.linspace(grid[changes[0]], grid[changes[0] + 1], GRID)
    return float(grid.mean())


def _values(f: Activation, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f(z) and f'(z)."""
    with jax.enable_x64(True):
        value, slope = _compiled(f)(jnp.asarray(z.ravel(), jnp.float64))
    return np.asarray(value).reshape(z.shape), np.asarray(slope).reshape(z.shape)


@functools.cache
def _compiled(f: Activation) -> Callable:
    return jax.jit(jax.vmap(jax.value_and_grad(f)))
