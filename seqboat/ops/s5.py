"""The continuous state space of S5 (Smith et al. 2023, arXiv 2208.04933): its start and its discretisation."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex

Discretization = Literal["zoh", "bilinear"]


class S5Params(NamedTuple):
    """Of one direction: `a_real_log`, `a_imag`, `dt_log` (P,); `b` (D, 2, P) and `c` (2, P, D), real and imaginary;
    `d` (D,)."""

    a_real_log: Array
    a_imag: Array
    dt_log: Array
    b: Array
    c: Array
    d: Array


def legs(states: int) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues (P,) of the normal part of the HiPPO-LegS matrix of size 2P, those with negative imaginary part,
    and their eigenvectors (2P, P). The others are their conjugates."""
    n = np.arange(2 * states)
    p = np.sqrt(n + 0.5)
    # A + p p^T, A_nk = -2 p_n p_k below the diagonal and -(n + 1) on it: -1/2 I plus a skew-symmetric matrix.
    skew = np.triu(np.outer(p, p), 1) - np.tril(np.outer(p, p), -1)
    imaginary, vectors = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * imaginary[:states], vectors[:, :states]


def discretize(params: S5Params, method: Discretization) -> tuple[Complex[Array, "P"], Complex[Array, "P"]]:
    """A' and the factor w of B' = w B, with one step dt = exp(dt_log) for each state:

    zoh:       A' = exp(dt A),                w = (A' - 1) / A
    bilinear:  A' = (2 + dt A) / (2 - dt A),  w = 2 dt / (2 - dt A)
    """
    a, dt = jax.lax.complex(-jnp.exp(params.a_real_log), params.a_imag), jnp.exp(params.dt_log)
    if method == "zoh":
        decay = jnp.exp(dt * a)
        # As published, to the last bits: where dt A is small, expm1 differs by 1e-5 in the gradient of A.
        return decay, (decay - 1) / a
    return (2 + dt * a) / (2 - dt * a), 2 * dt / (2 - dt * a)
