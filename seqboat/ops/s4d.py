"""The diagonal state space model S4D (Gu et al. 2022, arXiv 2206.11893) in its real convolutional and recurrent forms.

x' = A x + B u, y = Re(2 C x) with complex diagonal A, discretised by zero-order hold with one step dt per channel:
kappa[l] = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(l dt A_n), B folded into C.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from seqboat.ops.convolution import fft_convolve


class S4DParams(NamedTuple):
    """`log_step` (S,); `log_decay`, `frequency` (S, N): A = -exp(log_decay) + i frequency; `c_real`, `c_imag` (S, N);
    `skip` (D,). S is D, or 2D with the second half looking ahead."""

    log_step: Array
    log_decay: Array
    frequency: Array
    c_real: Array
    c_imag: Array
    skip: Array


def discretize(params: S4DParams) -> tuple[Complex[Array, "S N"], Complex[Array, "S N"]]:
    """dt A and the output weight C (exp(dt A) - 1) / A, each (S, N)."""
    a = -jnp.exp(params.log_decay.astype(jnp.float32)) + 1j * params.frequency.astype(jnp.float32)
    dt_a = jnp.exp(params.log_step.astype(jnp.float32))[:, None] * a
    c = params.c_real.astype(jnp.float32) + 1j * params.c_imag.astype(jnp.float32)
    return dt_a, c * jnp.expm1(dt_a) / a


def _powers(dt_a: Complex[Array, "S N"], lags: np.ndarray) -> Complex[Array, "S N K"]:
    """exp(lags dt A)."""
    return jnp.exp(dt_a[..., None] * lags[None, None])


def naive_kernel(params: S4DParams, length: int) -> Float[Array, "S K"]:
    """kappa[0..length-1] by its definition."""
    dt_a, weight = discretize(params)
    return 2 * jnp.einsum("sn,snk->sk", weight, _powers(dt_a, np.arange(length))).real


def kernel(params: S4DParams, length: int) -> Float[Array, "S K"]:
    """kappa[0..length-1] with exp((aC + b) z) = exp(aC z) exp(b z): S N (K/C + C) exponentials instead of S N K."""
    dt_a, weight = discretize(params)
    inner = 1 << max(0, (length - 1).bit_length() // 2)
    outer = -(-length // inner)
    coarse = weight[..., None] * _powers(dt_a, inner * np.arange(outer))
    product = 2 * jnp.einsum("sna,snb->sab", coarse, _powers(dt_a, np.arange(inner))).real
    return product.reshape(product.shape[0], outer * inner)[:, :length]


def convolve(
    params: S4DParams,
    x: Float[Array, "B L D"],
    valid: Bool[Array, "B L"] | None = None,
    *,
    truncation: int | None = None,
) -> Float[Array, "B L D"]:
    """The model's output at every element plus skip x; both directions where the parameters have two halves.

    Elements that are not `valid` enter as zeros but keep their own direct term. `truncation` cuts the kernel. Without
    elements the output is empty.
    """
    if not x.size:
        return x
    width, length = x.shape[2], x.shape[1]
    taps = kernel(params, length if truncation is None else min(truncation, length))
    signal = x.astype(jnp.float32) if valid is None else jnp.where(valid[..., None], x.astype(jnp.float32), 0)
    y = fft_convolve(signal, taps[:width], taps[width:] if taps.shape[0] > width else None)
    return (y + params.skip.astype(jnp.float32)[None, None] * x).astype(x.dtype)


def recurrent_step(
    params: S4DParams, state: Complex[Array, "B D N"], x: Float[Array, "B D"]
) -> tuple[Complex[Array, "B D N"], Float[Array, "B D"]]:
    """One step of a causal model; exactly what an untruncated `convolve` computes at this position."""
    dt_a, weight = discretize(params)
    state = jnp.exp(dt_a)[None] * state + x.astype(jnp.float32)[..., None]
    y = 2 * jnp.einsum("bdn,dn->bd", state, weight).real + params.skip.astype(jnp.float32)[None] * x
    return state, y.astype(x.dtype)


def stream(
    params: S4DParams, state: Complex[Array, "B D N"], x: Float[Array, "B L D"], lengths: Int[Array, "B"]
) -> tuple[Complex[Array, "B D N"], Float[Array, "B L D"]]:
    """`recurrent_step` over pieces of true `lengths`: the state after each piece's last valid element, and its outputs.
    Sequential: for decoding, slow for long pieces."""
    if params.log_step.shape[0] != params.skip.shape[0]:
        raise ValueError("a bidirectional model looks ahead and cannot be streamed")

    def step(state, element):
        t, x = element
        after, y = recurrent_step(params, state, x)
        return jnp.where((t < lengths)[:, None, None], after, state), y

    state, y = jax.lax.scan(step, state, (jnp.arange(x.shape[1]), x.swapaxes(0, 1)))
    return state, y.swapaxes(0, 1)
