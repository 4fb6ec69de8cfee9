"""Exact sliding-window attention over activated elements, the window counted in activated elements.

Element i of a sequence's activated elements reads element j iff |i - j| <= w, or 0 <= i - j <= w when causal: a FIFO of
the last w activated keys and values, however far apart they stood (Ren et al. 2023, arXiv 2306.11197).

`attend` is the masked dense form over any rows: the reference over all rows of a batch, and what a fast form computes
for one block of packed rows, whose keys are its own rows and `w` to each side (`attend_blocks`). `attend_packed` is the
same over all packed rows by a kernel, without weights of keys and without dropout.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.ops.blocks import Blocks, map_blocks
from seqboat.ops.packing import RowInfo
from seqboat.ops.window import Eviction, Window

# How far above the highest score that is read one that is not may stand.
MAX_UNREAD_MARGIN = 30.0
# The part of a window's total below which what remains of it without a key counts no less, since it is a difference.
LEAST_REMAINDER = 1e-3


def attend(
    window: Window,
    table: Float[Array, "P"] | None,
    q: Float[Array, "Q Z"],
    k: Float[Array, "J Z"],
    v: Float[Array, "J E"],
    query: RowInfo,
    key: RowInfo,
    drop: Float[Array, "Q J"] | None = None,
) -> Float[Array, "Q E"]:
    """o_i = sum_j phi(s_i)_j v_j,  s_ij = scale q_i . k_j + bias_ij,  over the keys that row i sees, else 0.

    q and k come from `window.apply_rotary`.

    phi is softmax, max(s, 0)^2, or Laplace 0.5 (1 + erf((s - mean) / (deviation sqrt 2))). A key with a `weight` w_j of
    0..1 enters with w_j times its exp(s) or phi(s). With softmax, e = exp(s), the gradient of a w_j that is 0 is what
    the step to 1 would change, e_j (v_j - o) / (total + e_j): the derivative, e_j (v_j - o) / total, has no bound.
    With `occupancy`, the gradients of w_j and of it add up to the change of o_i by switching j alone (`_switched`).
    `drop` multiplies the weights (dropout). Scores and weights are float32. Rows that may not be read may hold any
    finite number. Raises ValueError for an occupancy without a window size.
    """
    if not (q.shape[0] and k.shape[0]):
        return jnp.zeros((q.shape[0], v.shape[1]), v.dtype)
    scores = window.scores(table, q, k, query, key)
    visible = window.visible(query, key)
    evictions = () if key.occupancy is None else tuple(window.evictions(query, key))
    if window.function == "softmax":
        read = visible if key.weight is None else visible & (key.weight[None, :] > 0)
        highest = jax.lax.stop_gradient(jnp.where(read, scores, -jnp.inf).max(axis=1, keepdims=True))
        highest = jnp.where(jnp.isfinite(highest), highest, 0)
        # A key that is not read may score as high as it likes: its credit is bounded, and its exponential must be too.
        weights = jnp.exp(jnp.where(read, scores - highest, jnp.minimum(scores - highest, MAX_UNREAD_MARGIN)))
    else:
        weights = window.phi(scores)
    weights = jnp.where(functools.reduce(jnp.logical_or, [e.enters for e in evictions], visible), weights, 0)
    if key.weight is not None and key.occupancy is not None:
        weights *= _switched(window, key.weight, key.occupancy, weights, visible, evictions)
    elif key.weight is not None:
        weights *= _bounded(key.weight[None, :], weights) if window.function == "softmax" else key.weight[None, :]
    total = weights.sum(axis=1, keepdims=True)
    if drop is not None:
        weights *= drop
    out = jnp.einsum("qj,je->qe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    if window.function == "softmax":
        out = out / jnp.where(total > 0, total, 1)
    return out.astype(v.dtype)


def attend_blocks(
    window: Window, table: Array | None, q: Array, k: Array, v: Array, rows: RowInfo, blocks: Blocks
) -> Array:
    """`attend` over packed rows (T, ...), row i over those within `blocks.left` and `blocks.right` of its block; 0 for
    blocks that are not computed."""

    def each(table, own, halo):
        (q, query), (k, v, key) = own, halo
        return attend(window, table, q, k, v, query, key)

    return map_blocks(each, table, (q, rows), (k, v, rows), blocks)


def attend_packed(
    window: Window, table: Array | None, q: Array, k: Array, v: Array, rows: RowInfo, blocks: Blocks
) -> Array:
    """`attend` over packed rows (T, ...) by the Pallas kernel of this backend, interpreted and slow on a CPU
    (`ops.kernels.window_attention`). Keys have no weights."""
    from seqboat.ops.kernels.window_attention import attend_packed as run

    left, right = blocks.left, blocks.right
    return run(window, table, q, k, v, rows, blocks.filled, left=left, right=right, backend=_backend())


def kernel_unsupported_reason(window: Window) -> str | None:
    """Why the kernel of this backend does not compute this window; None if it does."""
    from seqboat.ops.kernels.window_attention import unsupported_reason

    return unsupported_reason(window, _backend())


def kernel_is_fast() -> bool:
    """Whether the kernel of this backend was measured to be faster than blocks: on GPUs that Triton compiles for."""
    capability = getattr(jax.devices()[0], "compute_capability", None) if jax.default_backend() == "gpu" else None
    return bool(re.fullmatch(r"\d+\.\d+", str(capability))) and float(str(capability)) >= 8


def kernel_notice() -> str | None:
    """What to know before choosing the kernel of this backend; None where there is nothing."""
    if _backend() == "triton" and jax.__version_info__ >= (0, 11):
        return f"jax {jax.__version__} deprecates its Triton backend and will remove it; 'blocks' stays"
    return None


def _backend() -> Any:
    return {"gpu": "triton", "tpu": "tpu"}.get(jax.default_backend(), "interpret")


def _bounded(weight: Float[Array, "1 J"], e: Float[Array, "Q J"]) -> Float[Array, "Q J"]:
    """The weights, their gradient times  total / (total + (1 - w) e)."""
    stop = jax.lax.stop_gradient
    total = stop((weight * e).sum(axis=1, keepdims=True))
    share = total / jnp.maximum(total + (1 - stop(weight)) * stop(e), jnp.finfo(jnp.float32).tiny)
    return stop(weight) + share * (weight - stop(weight))


def _switched(
    window: Window,
    weight: Float[Array, "J"],
    occupancy: Float[Array, "J"],
    e: Float[Array, "Q J"],
    visible: Bool[Array, "Q J"],
    evictions: tuple[Eviction, ...],
) -> Float[Array, "Q J"]:
    """The weights of visible keys, their gradients such that o changes as by switching key j alone: for softmax by

        j active:    (e_j (v_j - o) - e_n (v_n - o)) / (total - e_j + e_n)    n enters the window when j is off
        j inactive:  (e_j (v_j - o) - e_l (v_l - o)) / (total + e_j - e_l)    l leaves the window when j is on

    and otherwise, with e = phi, by e_j v_j - e_n v_n and e_j v_j - e_l v_l. Absent keys have e = 0. The terms of j are
    the gradient of its weight, those of n and l that of its occupancy. A query's own key has no gradient: without it
    there is no query.
    """
    stop, active = jax.lax.stop_gradient, weight[None, :] > 0.5
    total_of = lambda where, value: jnp.where(where, value, 0).sum(axis=1, keepdims=True)
    worth, cost = (change[None, :] - stop(change)[None, :] for change in (weight, occupancy))
    factor, e = jnp.where(visible, stop(weight)[None, :], 0), stop(e)
    total = (factor * e).sum(axis=1, keepdims=True)
    least = jnp.maximum(LEAST_REMAINDER * total, jnp.finfo(jnp.float32).tiny)
    for slot, enters, leaves in evictions:
        share = jnp.where(slot, 1.0, 0.0)
        if window.function == "softmax":
            after = total + jnp.where(active, total_of(enters, e) - e, e - total_of(leaves, e))
            share *= total / jnp.maximum(after, least)
        for evicted, when in ((enters, active), (leaves, ~active)):
            factor -= jnp.where(evicted, total_of(when, share * cost), 0)
        factor += share * worth
    return factor
