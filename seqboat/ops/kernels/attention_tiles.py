"""The kernel bodies of `window_attention`: one tile of rows against the tiles that it meets.

Every array is in tiles, (n, tile, width). A program owns one tile and loops over the tiles in `bounds`: in `forward`
and `query_gradient` it owns queries and meets keys, in `key_gradient` and `value_gradient` the reverse. The source is
shared by Triton, where a met array is the full one, and TPUs, where it is a window of it in VMEM.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from seqboat.ops import positions
from seqboat.ops.window import LAPLACE_DEVIATION, LAPLACE_MEAN, Window

Backend = Literal["triton", "tpu", "interpret"]

# The initial running maximum of a row, below every score. Differences of -inf would be NaN.
LOWEST = -1e30
# log(erfc(z) / t) + z^2 as a polynomial in t = 1 / (1 + z / 2), z >= 0: least squares on 400 Chebyshev nodes, 1e-7.
ERFC = (
    *(-1.2655122, 1.0000237, 0.37409196, 0.096784189, -0.18628806),
    *(0.27886808, -1.135204, 1.4885159, -0.82215223, 0.17087278),
)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Static parameters. `left` and `right` are how many rows before and after its own a query reads."""

    window: Window
    left: int
    right: int
    tile: int
    value_tile: int
    backend: Backend

    @property
    def windowed(self) -> bool:
        """Whether a program holds a window of the arrays that it meets, rather than the full arrays."""
        return self.backend == "tpu"

    def reach(self, n: int) -> int:
        """The largest number of tiles, of n, that one tile can meet."""
        return min(n, -(-self.left // self.tile) + 1 + -(-self.right // self.tile))


def dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    """The product of two tiles over one dimension of each, in float32."""
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


def table_entry(window: Window, size: int, query: tuple, key: tuple) -> Int[Array, "... Q J"]:
    """The index into the bias table for each pair: `Window.bias` without the look-up."""
    (_, query_rank, query_position), (_, key_rank, key_position) = query, key
    if window.position == "t5":
        return positions.t5_bucket(key_position - query_position, window.causal, size)
    if window.position == "slot":
        return jnp.clip(4 * (window.size or 0) - 1 + key_rank - query_rank, 0, size - 1)
    return jnp.clip((size - 1) // 2 + key_position - query_position, 0, size - 1)


def _columns(ref, *tile) -> tuple:
    """Segment, rank and position of a tile of queries, each (tile, 1)."""
    return tuple(ref[(*tile, slice(None), slice(c, c + 1))] for c in range(3))


def _rows(ref, *tile) -> tuple:
    """Segment, rank and position of a tile of keys, each (1, tile)."""
    return tuple(ref[(*tile, slice(c, c + 1), slice(None))] for c in range(3))


def _pairs(plan: KernelConfig, steps, q, k, query: tuple, key: tuple, table) -> tuple[Array, Array]:
    """The scores of a tile of queries against the tile of keys `steps` tiles after it, and which pairs are visible."""
    window, shape = plan.window, (plan.tile, plan.tile)
    scores = dot(q, k, 1, 1)
    if table is not None:
        scores += table[table_entry(window, table.shape[0], query, key)].astype(jnp.float32)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    distance = steps * plan.tile + column - row
    visible = (query[0] == key[0]) & (distance >= -plan.left)
    visible &= distance <= (0 if window.causal else plan.right)
    if window.size is not None:
        visible &= jnp.abs(key[1] - query[1]) <= window.size
    return scores, visible


def _phi(plan: KernelConfig, scores: Array) -> Array:
    """max(s, 0)^2 or Laplace, with an own error function, which Triton lacks."""
    if plan.window.function == "relu2":
        return jnp.square(jnp.maximum(scores, 0))
    x = (scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))
    z = jnp.abs(x)
    t = 1 / (1 + z / 2)
    polynomial = jnp.zeros_like(t)
    for coefficient in reversed(ERFC):
        polynomial = polynomial * t + coefficient
    tail = t * jnp.exp(polynomial - z * z)
    return 0.5 * jnp.where(x < 0, tail, 2 - tail)


def _weights(plan: KernelConfig, scores: Array, visible: Array, log_total: Array) -> Array:
    """The weights of a row, given its log-sum-exp."""
    weights = jnp.exp(scores - log_total) if plan.window.function == "softmax" else _phi(plan, scores)
    return jnp.where(visible, weights, 0.0)


def _score_gradient(plan: KernelConfig, scores: Array, visible: Array, saved: tuple, d_weights: Array) -> Array:
    """dS from dW: softmax  w (dW - <dO, o>),  relu2  2 max(s, 0) dW,  Laplace  density(s) dW."""
    log_total, credit = saved
    if plan.window.function == "softmax":
        gradient = jnp.exp(scores - log_total) * (d_weights - credit)
    elif plan.window.function == "relu2":
        gradient = 2 * jnp.maximum(scores, 0) * d_weights
    else:
        x = (scores - LAPLACE_MEAN) / LAPLACE_DEVIATION
        gradient = jnp.exp(-0.5 * x * x) / (LAPLACE_DEVIATION * math.sqrt(2 * math.pi)) * d_weights
    return jnp.where(visible, gradient, 0.0)


def _weight_gradient(plan: KernelConfig, width: int, d_o, v) -> Array:
    """dW = dO v^T, one tile of values at a time; `d_o` and `v` load the given columns."""

    def step(e, total):
        part = pl.ds(e * plan.value_tile, plan.value_tile)
        return total + dot(d_o(part), v(part), 1, 1)

    total, parts = jnp.zeros((plan.tile, plan.tile), jnp.float32), width // plan.value_tile
    if not plan.windowed:
        # A loop, because unrolled Triton would hold every tile of values in shared memory.
        return jax.lax.fori_loop(0, parts, step, total)
    # A TPU needs static column slices.
    for e in range(parts):
        total = step(e, total)
    return total


def _loop(plan: KernelConfig, bounds) -> tuple:
    """The own tile, the first tile it meets, the one past the last, and the start of the window that it can meet."""
    own = pl.program_id(0)
    return own, bounds[0, own], bounds[1, own], bounds[2, own] if plan.windowed else 0


def _saved(ref, *tile) -> tuple:
    """Log-sum-exp and <dO, o> for a tile of queries, each (tile, 1)."""
    return tuple(ref[(*tile, slice(None), slice(c, c + 1))] for c in range(2))


def read(plan: KernelConfig, bounds, q_ref, query_ref, k_ref, key_ref, v_ref, *rest):
    """o_i = sum_j w_ij v_j for one tile of values, and the log-sum-exp; softmax with a running maximum."""
    *table, o_ref, log_total_ref = rest
    own, first, end, base = _loop(plan, bounds)
    q, query = q_ref[...], _columns(query_ref)

    def step(j, carry):
        o, total, highest = carry
        key, v = _rows(key_ref, j - base), v_ref[j - base]
        scores, visible = _pairs(plan, j - own, q, k_ref[j - base], query, key, *(table or [None]))
        if plan.window.function == "softmax":
            above = jnp.maximum(highest, jnp.where(visible, scores, LOWEST).max(axis=1, keepdims=True))
            kept = jnp.exp(highest - above)
            o, total, highest = o * kept, total * kept, above
        weights = _weights(plan, scores, visible, highest)
        return o + dot(weights.astype(v.dtype), v, 1, 0), total + weights.sum(axis=1, keepdims=True), highest

    zero = jnp.zeros((plan.tile, 1), jnp.float32)
    carry = (jnp.zeros((plan.tile, plan.value_tile), jnp.float32), zero, zero + LOWEST)
    o, total, highest = jax.lax.fori_loop(first, end, step, carry)
    if plan.window.function == "softmax":
        some = total > 0
        total = jnp.where(some, total, 1.0)
        o = o / total
        zero = jnp.where(some, highest + jnp.log(total), 0.0)
    o_ref[...] = o.astype(o_ref.dtype)
    # Every tile of values computes the same.
    log_total_ref[...] = zero


def query_gradient(plan: KernelConfig, bounds, q_ref, query_ref, saved_ref, d_o_ref, k_ref, key_ref, v_ref, *rest):
    """dq_i = sum_j dS_ij k_j;  with a table also dS, one tile of pairs after another, 0 for tiles not met."""
    *table, d_q_ref = rest if len(rest) == 1 else rest[:-1]
    own, first, end, base = _loop(plan, bounds)
    q, query, saved = q_ref[...], _columns(query_ref), _saved(saved_ref)
    if table:
        d_scores_ref, begin = rest[-1], bounds[2, own]

        def clear(t, _):
            d_scores_ref[t] = jnp.zeros((plan.tile, plan.tile), jnp.float32)

        # Only tiles that the loop does not write: two stores by different threads of a program are unordered.
        jax.lax.fori_loop(0, jnp.maximum(first - begin, 0), clear, None)
        jax.lax.fori_loop(jnp.maximum(end - begin, 0), d_scores_ref.shape[0], clear, None)

    def step(j, d_q):
        k = k_ref[j - base]
        scores, visible = _pairs(plan, j - own, q, k, query, _rows(key_ref, j - base), *(table or [None]))
        d_weights = _weight_gradient(
            plan, v_ref.shape[-1], lambda part: d_o_ref[:, part], lambda part: v_ref[j - base, :, part]
        )
        d_scores = _score_gradient(plan, scores, visible, saved, d_weights)
        if table:
            d_scores_ref[j - begin] = d_scores
        return d_q + dot(d_scores.astype(k.dtype), k, 1, 0)

    d_q = jax.lax.fori_loop(first, end, step, jnp.zeros(d_q_ref.shape, jnp.float32))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def key_gradient(plan: KernelConfig, bounds, k_ref, key_ref, v_ref, q_ref, query_ref, saved_ref, d_o_ref, *rest):
    """dk_j = sum_i dS_ij q_i"""
    *table, d_k_ref = rest
    own, first, end, base = _loop(plan, bounds)
    k, key = k_ref[...], _rows(key_ref)

    def step(i, d_k):
        q = q_ref[i - base]
        scores, visible = _pairs(plan, own - i, q, k, _columns(query_ref, i - base), key, *(table or [None]))
        d_weights = _weight_gradient(
            plan, v_ref.shape[-1], lambda part: d_o_ref[i - base, :, part], lambda part: v_ref[:, part]
        )
        d_scores = _score_gradient(plan, scores, visible, _saved(saved_ref, i - base), d_weights)
        return d_k + dot(d_scores.astype(q.dtype), q, 0, 0)

    d_k = jax.lax.fori_loop(first, end, step, jnp.zeros(d_k_ref.shape, jnp.float32))
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)


def value_gradient(plan: KernelConfig, bounds, k_ref, key_ref, q_ref, query_ref, saved_ref, d_o_ref, *rest):
    """dv_j = sum_i w_ij dO_i  for one tile of values."""
    *table, d_v_ref = rest
    own, first, end, base = _loop(plan, bounds)
    k, key = k_ref[...], _rows(key_ref)

    def step(i, d_v):
        query, d_o = _columns(query_ref, i - base), d_o_ref[i - base]
        scores, visible = _pairs(plan, own - i, q_ref[i - base], k, query, key, *(table or [None]))
        weights = _weights(plan, scores, visible, _saved(saved_ref, i - base)[0])
        return d_v + dot(weights.astype(d_o.dtype), d_o, 0, 0)

    d_v = jax.lax.fori_loop(first, end, step, jnp.zeros((plan.tile, plan.value_tile), jnp.float32))
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)
