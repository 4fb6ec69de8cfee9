"""Diagonal linear recurrences with constant decays:  h_t = a h_{t-1} + b_t,  each state on its own.

The decays a and the states h are complex64, |a| <= 1. `into` and `out_of` are the dense products around a recurrence of
real inputs and outputs.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

Method = Literal["auto", "reference", "associative"]


def choose(method: Method) -> Method:
    """Resolves "auto": on a CPU the scan, elsewhere the form of log L steps.

    Milliseconds on one CPU core, forward and backward with the products around it, for D = P = 64 and (B, L) of
    (16, 1024) and (1, 8192): scan 124 and 30, scans within and over chunks of 32 131 and 57, products with a chunk's
    decay powers 240 and 89, associative 178 and 68. Accelerators are not measured.
    """
    if method != "auto":
        return method
    return "reference" if jax.default_backend() == "cpu" else "associative"


def linear(
    decay: Complex[Array, "P"],
    input: Complex[Array, "B L P"],
    valid: Bool[Array, "B L"],
    state: Complex[Array, "B P"] | None = None,
    *,
    reverse: bool = False,
    method: Method = "auto",
) -> tuple[Complex[Array, "B L P"], Complex[Array, "B P"]]:
    """h_t for every t, from `state` or zeros, and the last one. With `reverse` h_t = a h_{t+1} + b_t, from the end.

    An element that is not valid leaves the state as it is.
    """
    state = jnp.zeros(input.shape[::2], input.dtype) if state is None else state
    run = _scan if choose(method) == "reference" else _associative
    return run(decay, input, valid, state, reverse)


def _scan(decay: Array, input: Array, valid: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    def step(h, element):
        b, valid = element
        h = jnp.where(valid[:, None], decay[None] * h + b, h)
        return h, h

    after, h = jax.lax.scan(step, state, (input.swapaxes(0, 1), valid.T), reverse=reverse)
    return h.swapaxes(0, 1), after


def _associative(decay: Array, input: Array, valid: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    def join(first, second):
        (a, b), (c, d) = first, second
        return a * c, c * b + d

    if not input.size:
        return input, state
    valid = valid[..., None]
    decays = jnp.where(valid, decay[None, None], 1)
    total, h = jax.lax.associative_scan(join, (decays, jnp.where(valid, input, 0)), reverse=reverse, axis=1)
    h += total * state[:, None]
    return h, h[:, 0 if reverse else -1]


def into(x: Float[Array, "B L D"], matrix: Float[Array, "D 2 P"]) -> Complex[Array, "B L P"]:
    """x B for B = matrix[:, 0] + i matrix[:, 1]: one real product in the dtype of x, summed in float32."""
    width, _, states = matrix.shape
    matrix = matrix.reshape(width, 2 * states).astype(x.dtype)
    product = jnp.einsum("bld,dp->blp", x, matrix, preferred_element_type=jnp.float32)
    return jax.lax.complex(product[..., :states], product[..., states:])


def out_of(h: Complex[Array, "B L P"], matrix: Float[Array, "2 P D"], dtype: jnp.dtype) -> Float[Array, "B L D"]:
    """Re(h C) for C = matrix[0] + i matrix[1]: one real product in `dtype`, summed and returned in float32."""
    parts = jnp.concatenate([h.real, h.imag], axis=-1).astype(dtype)
    matrix = jnp.concatenate([matrix[0], -matrix[1]]).astype(dtype)
    return jnp.einsum("blp,pd->bld", parts, matrix, preferred_element_type=jnp.float32)
