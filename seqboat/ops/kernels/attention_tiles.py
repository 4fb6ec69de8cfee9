"""The kernel bodies of `window_attention`: one tile of rows against the tiles that it meets.

Every array is in tiles, (n, tile, width). A band, (n, slots, tile, tile), has one matrix for each pair of tiles that
can meet: slot j - i + before(n) of row i is the pair of queries i and keys j. Only pairs that meet are written, and
only they are read; the others hold anything.

    log_totals           log sum_j exp(s_ij)                      the scores are computed here and in `weights` alone
    weights              w_ij, and its derivative by s_ij         band
    product              out_i = sum_j band_ij x_j                values (w v), query_gradient (dS k)
    score_gradient       dS_ij = slope_ij (<dO_i, v_j> - credit_i)     band
    transposed_product   out_j = sum_i band_ij^T x_i              key_gradient (dS^T q), value_gradient (w^T dO)

A program owns one tile and loops over the tiles that it meets, given by `bounds` (`window_attention.TileMetadata`). The
source is shared by Triton, where a met array is the full one, and TPUs, where it is a window of it in VMEM.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from seqboat.ops import positions
from seqboat.ops.window import LAPLACE_DEVIATION, LAPLACE_MEAN, Window

Backend = Literal["triton", "tpu", "interpret"]

# The score of a pair that is not visible: its weight is exactly 0 under every function. Differences of -inf would be
# NaN.
LOWEST = -1e30
# Columns of values per step of dO v^T in Triton: 64 x 64 tiles in flight leave registers and shared memory for four
# programs per multiprocessor.
WEIGHT_GRADIENT_COLUMNS = 64
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

    @property
    def has_table(self) -> bool:
        """Whether scores have a bias from a table."""
        return self.window.position not in ("none", "rotary")

    def before(self, n: int) -> int:
        """The largest number of tiles, of n, that a tile of queries can meet before its own."""
        return min(n - 1, -(-self.left // self.tile))

    def slots(self, n: int) -> int:
        """The number of tiles in a row of a band of n rows."""
        return self.before(n) + 1 + min(n - 1, -(-self.right // self.tile))

    def reach(self, n: int) -> int:
        """The largest number of tiles, of n, that one tile can meet."""
        return min(n, self.slots(n))


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


def _columns(ref) -> tuple:
    """Segment, rank and position of a tile of queries, each (tile, 1)."""
    return tuple(ref[:, c : c + 1] for c in range(3))


def _rows(ref, tile) -> tuple:
    """Segment, rank and position of a tile of keys, each (1, tile)."""
    return tuple(ref[tile, c : c + 1] for c in range(3))


def _visible(plan: KernelConfig, offset, query: tuple, key: tuple) -> Bool[Array, "Q J"]:
    """Which pairs are visible, of a tile of queries and the tile of keys `offset` tiles after it."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (plan.tile, plan.tile), axis) for axis in (0, 1))
    distance = offset * plan.tile + column - row
    visible = (query[0] == key[0]) & (distance >= -plan.left)
    visible &= distance <= (0 if plan.window.causal else plan.right)
    if plan.window.size is not None:
        visible &= jnp.abs(key[1] - query[1]) <= plan.window.size
    return visible


def _all_visible(plan: KernelConfig, bounds, own, j) -> Bool[Array, ""]:
    """Whether all pairs of two tiles are visible: of one sequence, readable, and near enough. In a sequence, ranks are
    at most as far apart as rows."""
    furthest = plan.tile - 1
    left, right = plan.left, 0 if plan.window.causal else plan.right
    if plan.window.size is not None:
        left, right = min(left, plan.window.size), min(right, plan.window.size)
    near = ((own - j) * plan.tile + furthest <= left) & ((j - own) * plan.tile + furthest <= right)
    return near & (bounds[3, own] == bounds[4, j])


def _phi(plan: KernelConfig, scores: Float[Array, "Q J"]) -> Float[Array, "Q J"]:
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


def _slope(plan: KernelConfig, scores: Float[Array, "Q J"]) -> Float[Array, "Q J"]:
    """The derivative of `_phi`."""
    if plan.window.function == "relu2":
        return 2 * jnp.maximum(scores, 0)
    x = (scores - LAPLACE_MEAN) / LAPLACE_DEVIATION
    return jnp.exp(-0.5 * x * x) / (LAPLACE_DEVIATION * math.sqrt(2 * math.pi))


def _met(plan: KernelConfig, bounds) -> tuple:
    """The own tile, the first tile it meets, the one past the last, and the start of the window that it can meet."""
    own = pl.program_id(0)
    return own, bounds[0, own], bounds[1, own], bounds[2, own] if plan.windowed else 0


def _met_pairs(plan: KernelConfig, bounds) -> tuple:
    """`_met` for a kernel whose results are pairs: on a GPU one pair per program, for more programs."""
    own, first, end, base = _met(plan, bounds)
    if not plan.windowed:
        j = own - plan.before(bounds.shape[1]) + pl.program_id(1)
        first, end = jnp.maximum(first, j), jnp.minimum(end, j + 1)
    return own, first, end, base


def _scores(plan: KernelConfig, bounds, base, q_ref, query_ref, k_ref, key_ref, table):
    """The function from j to the scores of the own queries against the tile of keys j, LOWEST where not visible."""
    own, q, query = pl.program_id(0), q_ref[...], _columns(query_ref)

    def scores(j):
        key = _rows(key_ref, j - base)
        s = dot(q, k_ref[j - base], 1, 1)
        if plan.has_table:
            s += table[table_entry(plan.window, table.shape[0], query, key)].astype(jnp.float32)
        mask = lambda s: jnp.where(_visible(plan, j - own, query, key), s, LOWEST)
        return jax.lax.cond(_all_visible(plan, bounds, own, j), lambda s: s, mask, s)

    return scores


def log_totals(plan: KernelConfig, bounds, q_ref, query_ref, k_ref, key_ref, *rest):
    """log sum_j exp(s_ij) over the visible keys, by a running maximum; 0 without any."""
    *table, out_ref = rest
    _, first, end, base = _met(plan, bounds)
    scores = _scores(plan, bounds, base, q_ref, query_ref, k_ref, key_ref, *(table or [None]))

    def step(j, carry):
        total, highest = carry
        s = scores(j)
        above = jnp.maximum(highest, s.max(axis=1, keepdims=True))
        return total * jnp.exp(highest - above) + jnp.exp(s - above).sum(axis=1, keepdims=True), above

    zero = jnp.zeros((plan.tile, 1), jnp.float32)
    # The initial maximum is above LOWEST, so that pairs that are not visible count 0 from the start.
    total, highest = jax.lax.fori_loop(first, end, step, (zero, zero + LOWEST / 2))
    some = total > 0
    out_ref[...] = jnp.where(some, highest + jnp.log(jnp.where(some, total, 1.0)), 0.0)


def weights(plan: KernelConfig, bounds, q_ref, query_ref, log_total_ref, k_ref, key_ref, *rest):
    """w_ij = exp(s_ij - log_total_i) or phi(s_ij), 0 where not visible; with a second output also phi'(s_ij)."""
    table, (w_ref, *slope_ref) = (rest[0], rest[1:]) if plan.has_table else (None, rest)
    own, first, end, base = _met_pairs(plan, bounds)
    scores = _scores(plan, bounds, base, q_ref, query_ref, k_ref, key_ref, table)
    log_total, before = log_total_ref[...], plan.before(bounds.shape[1])

    def step(j, _):
        s = scores(j)
        w = jnp.exp(s - log_total) if plan.window.function == "softmax" else _phi(plan, s)
        w_ref[j - own + before] = w.astype(w_ref.dtype)
        for ref in slope_ref:
            ref[j - own + before] = _slope(plan, s).astype(ref.dtype)

    jax.lax.fori_loop(first, end, step, None)


def product(plan: KernelConfig, bounds, band_ref, x_ref, out_ref):
    """out_i = sum_j band_ij x_j for one tile of columns."""
    own, first, end, base = _met(plan, bounds)
    before = plan.before(bounds.shape[1])
    step = lambda j, out: out + dot(band_ref[j - own + before], x_ref[j - base], 1, 0)
    out = jax.lax.fori_loop(first, end, step, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = out.astype(out_ref.dtype)


def transposed_product(plan: KernelConfig, bounds, band_ref, x_ref, out_ref):
    """out_j = sum_i band_ij^T x_i for one tile of columns. On a TPU `band_ref` holds only the pairs of the own tile."""
    own, first, end, base = _met(plan, bounds)
    before = plan.before(bounds.shape[1])

    def step(i, out):
        slot = own - i + before
        pair = band_ref[slot] if plan.windowed else band_ref[i, slot]
        return out + dot(pair, x_ref[i - base], 0, 0)

    out = jax.lax.fori_loop(first, end, step, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = out.astype(out_ref.dtype)


def score_gradient(plan: KernelConfig, bounds, slope_ref, d_o_ref, credit_ref, v_ref, d_s_ref):
    """dS_ij = slope_ij (<dO_i, v_j> - credit_i); for softmax the slope is w_ij and the credit <dO_i, o_i>, else 0."""
    own, first, end, base = _met_pairs(plan, bounds)
    credit, before = credit_ref[...], plan.before(bounds.shape[1])

    def step(j, _):
        d_w = _weight_gradient(plan, lambda part: d_o_ref[:, part], lambda part: v_ref[j - base, :, part], v_ref.shape)
        slope = slope_ref[j - own + before].astype(jnp.float32)
        # Rows that are not read may hold any finite number, so that <dO, v> may overflow.
        d_s = jnp.where(slope == 0, 0.0, slope * (d_w - credit))
        d_s_ref[j - own + before] = d_s.astype(d_s_ref.dtype)

    jax.lax.fori_loop(first, end, step, None)


def _weight_gradient(plan: KernelConfig, d_o, v, shape: tuple) -> Float[Array, "Q J"]:
    """dW = dO v^T, some columns at a time; `d_o` and `v` load the given ones."""
    size = plan.value_tile if plan.windowed else min(plan.value_tile, WEIGHT_GRADIENT_COLUMNS)

    def step(e, total):
        part = pl.ds(e * size, size)
        return total + dot(d_o(part), v(part), 1, 1)

    total, parts = jnp.zeros((plan.tile, plan.tile), jnp.float32), shape[-1] // size
    if not plan.windowed:
        # A loop, because unrolled Triton would hold all values in shared memory.
        return jax.lax.fori_loop(0, parts, step, total)
    # A TPU needs static column slices.
    for e in range(parts):
        total = step(e, total)
    return total
