"""The block of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7) around `ops.ssd`.

With [z | u | dt] = x W_in and, for every head, rates A = exp(a_log):

    [v | b | c] = silu(convolution(u)),   dt_t = softplus(dt_t + dt_bias),
    h_t = exp(-A dt_t) h_{t-1} + dt_t v_t b_t^T,   y_t = h_t c_t + d v_t,
    output = RMSNorm(y silu(z)) W_out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqboat.ops import ssd

EPSILON = 1e-5


class Mamba2Params(NamedTuple):
    """Of one direction, with H heads of P channels, I = H P, N values of state for each, and K taps:

    `in_projection` (D, 2I + 2N + H), `convolution` (K, I + 2N), the last tap that of the element itself,
    `convolution_bias` (I + 2N,), `dt_bias`, `a_log`, `d` (H,), `norm_scale` (I,), `out_projection` (I, D).
    """

    in_projection: Array
    convolution: Array
    convolution_bias: Array
    dt_bias: Array
    a_log: Array
    d: Array
    norm_scale: Array
    out_projection: Array


class State(NamedTuple):
    """Of B streams, float32: the heads' states (B, H, P, N), and the last inputs u of the convolution (B, K - 1,
    I + 2N)."""

    heads: Array
    recent: Array


def initial_state(batch: int, heads: int, head_size: int, state_size: int, taps: int) -> State:
    """The state of B streams at their start."""
    return State(
        jnp.zeros((batch, heads, head_size, state_size)),
        jnp.zeros((batch, taps - 1, heads * head_size + 2 * state_size)),
    )


def advance(
    params: Mamba2Params, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: State, chunk: int
) -> tuple[Float[Array, "B L D"], State]:
    """The outputs, in x's dtype, and the state after each stream's last valid element.

    An element that is not valid has dt = 0 and u = 0. Products are in the dtype of x; decays, convolution and norm are
    computed in float32.
    """
    inner, heads = len(params.norm_scale), len(params.a_log)
    product = jnp.einsum("bld,de->ble", x, params.in_projection.astype(x.dtype))
    z, u, dt = jnp.split(product, [inner, product.shape[-1] - heads], axis=-1)
    dt = jnp.where(valid[..., None], jax.nn.softplus(dt.astype(jnp.float32) + params.dt_bias[None, None]), 0)
    u, recent = _convolve(params, jnp.where(valid[..., None], u, 0).astype(jnp.float32), valid, state.recent)
    v, b, c = jnp.split(jax.nn.silu(u).astype(x.dtype), [inner, (inner + u.shape[-1]) // 2], axis=-1)
    v = v.reshape(*v.shape[:2], heads, inner // heads)
    log_decay = -jnp.exp(params.a_log)[None, None] * dt
    y, after = ssd.chunked((dt[..., None] * v).astype(x.dtype), log_decay, b, c, state.heads, chunk)
    y = (y + params.d[None, None, :, None] * v).reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON) * params.norm_scale[None, None]
    return jnp.einsum("ble,ed->bld", y.astype(x.dtype), params.out_projection.astype(x.dtype)), State(after, recent)


def _convolve(
    params: Mamba2Params, u: Float[Array, "B L C"], valid: Bool[Array, "B L"], recent: Float[Array, "B T C"]
) -> tuple[Float[Array, "B L C"], Float[Array, "B T C"]]:
    """Every channel's weighted sum of the last K = T + 1 elements, and the last T valid ones."""
    length, before = u.shape[1], recent.shape[1]
    joined = jnp.concatenate([recent, u], axis=1)
    y = sum(tap[None, None] * joined[:, k : k + length] for k, tap in enumerate(params.convolution))
    last = valid.sum(1)[:, None] + np.arange(before)[None]
    return y + params.convolution_bias[None, None], jnp.take_along_axis(joined, last[..., None], axis=1)
