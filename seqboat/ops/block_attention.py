"""Window attention over packed rows in blocks, with a gradient that recomputes the scores only.

    o_i = sum_j p_ij v_j,    p_ij = exp(s_ij - l_i) with l_i = log sum_j exp(s_ij) (softmax), or phi(s_ij)

The caller keeps o (Q, E) and l (Q,) and gives them back. From the cotangent do of o, the backward pass computes

    dp_ij = do_i . v_j    ds_ij = p_ij (dp_ij - do_i . o_i), or phi'(s_ij) dp_ij    dv_j = sum_i p_ij do_i

and the gradients of q, k and the table as those of the scores: a product of Q x J x E less than recomputing o.
As in `ops.window_attention.attend`, scores, p and ds are float32, and products have the operands' type.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.ops.blocks import Blocks, map_blocks
from seqboat.ops.packing import RowInfo
from seqboat.ops.window import Window


class Attended(NamedTuple):
    """o (Q, E) and l (Q,) of a block of queries; l is 0 for rows that see nothing, and without softmax."""

    o: Array
    log_total: Array


def attend_blocks(
    window: Window,
    table: Float[Array, "P"] | None,
    q: Float[Array, "T Z"],
    k: Float[Array, "T Z"],
    v: Float[Array, "T E"],
    rows: RowInfo,
    blocks: Blocks,
) -> Float[Array, "T E"]:
    """Row i: `attend` over the rows within `blocks.left` and `blocks.right` of its block; 0 for blocks not computed.

    q and k come from `window.apply_rotary`. `rows.weight` must be None.
    """

    def attend(table, own, halo, known=None):
        (q, query), (k, v, key) = own, halo
        found = attend_block(window, table, q, k, v, query, key, known)
        return found.o, found

    return map_blocks(attend, table, (q, rows), (k, v, rows), blocks, keep=True)


def attend_block(
    window: Window,
    table: Float[Array, "P"] | None,
    q: Float[Array, "Q Z"],
    k: Float[Array, "J Z"],
    v: Float[Array, "J E"],
    query: RowInfo,
    key: RowInfo,
    known: Attended | None = None,
) -> Attended:
    """`attend` and l. If they are `known`, they are not computed again, and have the gradient above, but none of l."""
    args = window, table, q, k, v, query, key
    return _attend(*args) if known is None else _known(*args, known)


def _attend(
    window: Window, table: Array | None, q: Array, k: Array, v: Array, query: RowInfo, key: RowInfo
) -> Attended:
    visible = window.visible(query, key)
    scores = window.scores(table, q, k, query, key)
    if window.function != "softmax":
        o = _product("qj,je->qe", jnp.where(visible, window.phi(scores), 0).astype(v.dtype), v)
        return Attended(o.astype(v.dtype), jnp.zeros(o.shape[0], jnp.float32))
    scores = jnp.where(visible, scores, -jnp.inf)
    highest = scores.max(axis=1)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.exp(scores - highest[:, None])
    total = weights.sum(axis=1)
    total = jnp.where(total > 0, total, 1)
    o = _product("qj,je->qe", weights.astype(v.dtype), v) / total[:, None]
    return Attended(o.astype(v.dtype), highest + jnp.log(total))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(window: Window, *args: Any) -> Attended:
    """`_attend` of a block whose result, the last argument, is known."""
    return args[-1]


def _forward(window: Window, *args: Any) -> tuple[Attended, tuple]:
    return args[-1], args


def _backward(window: Window, saved: tuple, cotangent: Attended) -> tuple:
    table, q, k, v, query, key, known = saved
    d_o, visible = cotangent.o, window.visible(query, key)
    scores, transpose = jax.vjp(lambda table, q, k: window.scores(table, q, k, query, key), table, q, k)
    d_weights = _product("qe,je->qj", d_o, v)
    if window.function == "softmax":
        weights = jnp.where(visible, jnp.exp(scores - known.log_total[:, None]), 0)
        mean = (d_o.astype(jnp.float32) * known.o.astype(jnp.float32)).sum(axis=1, keepdims=True)
        d_scores = weights * (d_weights - mean)
    else:
        weights, slope = jax.vjp(lambda s: jnp.where(visible, window.phi(s), 0), scores)
        (d_scores,) = slope(d_weights)
    d_v = _product("qj,qe->je", weights.astype(d_o.dtype), d_o).astype(v.dtype)
    return *transpose(d_scores), d_v, None, None, None


_known.defvjp(_forward, _backward)


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
