"""Sequences whose length axis is split evenly over the devices of one mesh axis.

Pure functions of one device's piece, called inside `jax.shard_map(..., check_vma=False)`. Piece i of S holds elements
i L .. (i+1) L - 1, with L the local length. Differentiating through the shard_map gives full gradients; those of
replicated parameters are summed over the devices. Collectives are static: none depends on the data.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact

from seqboat.ops import ema, neighbours, recurrence
from seqboat.ops.ema import EMAParams
from seqboat.ops.neighbours import Around, Stretch
from seqboat.ops.packing import Packing, compress

Tree = Any


def exclusive_scan(
    combine: Callable[[Tree, Tree], Tree], value: Tree, identity: Tree, axis: str, *, reverse: bool = False
) -> Tree:
    """v_0 * .. * v_(i-1) on shard i, or with `reverse` v_(i+1) * .. * v_(S-1), where a * b = combine(a, b).

    `combine` is associative and need not commute: its left argument always comes from the earlier shards. `identity`
    has the structure of `value`, with leaves that broadcast to those of `value`; it is the result on the first shard,
    or on the last with `reverse`.

    For S > 1 each leaf is permuted 1 + ceil(log2(S - 1)) times (S = 2: once), with one value sent per device each time,
    and as often again for the gradient. Gathering all values would be one collective, but S values in memory.
    """
    size = jax.lax.axis_size(axis)
    if size == 1:
        return jax.tree.map(lambda v, e: jnp.broadcast_to(jnp.asarray(e, v.dtype), v.shape), value, identity)
    total = _receive(value, identity, axis, 1, reverse)
    reach = 1  # `total` combines this many neighbours, or all of them if fewer
    while reach < size - 1:
        farther = _receive(total, identity, axis, reach, reverse)
        total = combine(total, farther) if reverse else combine(farther, total)
        reach *= 2
    return total


def _receive(value: Tree, identity: Tree, axis: str, distance: int, reverse: bool) -> Tree:
    """The value of the shard `distance` before this one (after it, if `reverse`), or the identity."""
    size, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    pairs = [(i, i + distance) for i in range(size - distance)]
    if reverse:
        pairs = [(target, source) for source, target in pairs]
    exists = index < size - distance if reverse else index >= distance
    # Devices without a sender get zeros, which need not be the identity.
    return jax.tree.map(lambda v, e: jnp.where(exists, jax.lax.ppermute(v, axis, pairs), e), value, identity)


def convolve(
    params: EMAParams,
    x: Float[Array, "B L D"],
    valid: Bool[Array, "B L"] | None,
    axis: str,
    method: ema.Method = "auto",
) -> Float[Array, "B L D"]:
    """This piece of the untruncated `ops.ema.convolve` of the full sequences, in one direction or both.

    Every piece is averaged from a zero state; the outgoing states are scanned over the shards,

        h entering i+1 = q^L h entering i + h leaving i,

    and the contribution of the entering state, sum_n gamma_n / sqrt(N) q_n^(t+1) h_n, is added. If the piece is
    averaged by FFT, exchange and average do not wait for each other.

    Each direction costs the collectives of one `exclusive_scan` of one leaf of 4 (B + 1) D N bytes, of which 4 D N are
    the decay: for S = 8, 4 permutes, and 4 more for the gradient. Memory beyond the local average is B D N L / C
    numbers, C ~ sqrt(L), never B L D N.
    """
    y, leaving = ema.convolve_piece(params, x, valid, method)
    length = x.shape[1]
    entering = tuple(
        _entering(own, state, length, axis, ahead)
        for (ahead, own), state in zip(params.directions, leaving, strict=True)
    )
    return (y + ema.continuation(params, entering, length)).astype(x.dtype)


def _entering(
    params: EMAParams, leaving: Float[Array, "B D N"], length: int, axis: str, ahead: bool
) -> Float[Array, "B D N"]:
    """The state entering this piece in one direction, from all pieces before it (after it, if `ahead`)."""
    decay = jnp.exp(length * ema.coefficients(params).log_decay)[None]
    # The decay over a piece is an extra row of the states: one leaf, one collective per step.
    value = jnp.concatenate([decay, leaving])
    identity = jnp.concatenate([jnp.ones_like(decay), jnp.zeros_like(leaving)])
    combine = (lambda left, right: _chain(right, left)) if ahead else _chain
    return exclusive_scan(combine, value, identity, axis, reverse=ahead)[1:]


def linear(
    decay: Complex[Array, "P"], input: Complex[Array, "B L P"], valid: Bool[Array, "B L"], axis: str, reverse: bool
) -> Complex[Array, "B L P"]:
    """This piece of `ops.recurrence.linear` of the full sequences from zeros.

    Every piece starts from zeros; the outgoing states are scanned over the shards, and a_t ... a_1 times the entering
    state is added, with a = 1 where an element is not valid. The collectives are those of one `exclusive_scan` of one
    leaf of 16 B P bytes.
    """
    h, leaving = recurrence.linear(decay, input, valid, reverse=reverse)
    one = jnp.ones_like(leaving)
    powers, total = recurrence.linear(decay, jnp.zeros_like(input), valid, one, reverse=reverse)
    combine = (lambda left, right: _chain(right, left)) if reverse else _chain
    value, identity = jnp.stack([total, leaving]), jnp.stack([one, 0 * one])
    return h + powers * exclusive_scan(combine, value, identity, axis, reverse=reverse)[1][:, None]


def _chain(first: Inexact[Array, "R D N"], second: Inexact[Array, "R D N"]) -> Inexact[Array, "R D N"]:
    """(a, h) then (b, g): (a b, b h + g), with the decay in row 0."""
    return second[:1] * first + jnp.concatenate([jnp.zeros_like(second[:1]), second[1:]])


def around(stretch: Stretch, left: int, right: int, axis: str) -> Around:
    """This device's piece of every sequence, with the `left` computed elements before it, from earlier devices, and the
    `right` ones after it."""

    def beside(size, reverse):
        kept, computed = last_active(stretch._replace(computed=None), stretch.computed, size, axis, reverse=reverse)
        return kept._replace(computed=computed)

    return neighbours.join(beside(left, False) if left else None, stretch, beside(right, True) if right else None)


def last_active(
    rows: Tree, active: Bool[Array, "B L"], size: int, axis: str, *, reverse: bool = False
) -> tuple[Tree, Bool[Array, "B {size}"]]:
    """The last `size` active rows of all shards before this one, and which slots are filled.

    Leaves (B, L, ...) become (B, size, ...): rows in order, the newest in the last slot; if there are fewer, the first
    slots are zero and not `there`. With `reverse`, the first `size` active rows of all shards after this one, the
    nearest in slot 0. They may be any number of shards away. The gradient flows back to the shard of the row, by
    gathers.

    Costs the collectives of one `exclusive_scan` with one leaf more than `rows`: in each permute a device sends B
    `size` rows and as many booleans, however few are filled.
    """
    own = _keep(rows, active, size, reverse)
    nothing = jax.tree.map(jnp.zeros_like, own)
    return exclusive_scan(functools.partial(_merge, first=reverse), own, nothing, axis, reverse=reverse)


def _merge(left: tuple[Tree, Array], right: tuple[Tree, Array], first: bool) -> tuple[Tree, Array]:
    """The rows kept of two neighbouring stretches together, from those kept of each."""
    rows, there = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), left, right)
    return _keep(rows, there, left[1].shape[1], first)


def _keep(rows: Tree, active: Bool[Array, "B L"], size: int, first: bool) -> tuple[Tree, Bool[Array, "B {size}"]]:
    """The last `size` active rows of each sequence, in the last slots; or the first, in the first slots."""
    batch, length = active.shape
    rank = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    place = rank - 1 if first else rank - 1 + size - rank[:, -1:]
    kept = (active & (place >= 0) & (place < size)).reshape(-1)
    slot = (place + size * np.arange(batch, dtype=np.int32)[:, None]).reshape(-1)
    source = jnp.full(batch * size, -1, jnp.int32)
    source = source.at[jnp.where(kept, slot, batch * size)].set(np.arange(batch * length, dtype=np.int32), mode="drop")
    packing = Packing(source, jnp.where(kept, slot, -1), kept.sum())
    flat = jax.tree.map(lambda a: a.reshape(batch * length, *a.shape[2:]), rows)
    out = jax.tree.map(lambda a: a.reshape(batch, size, *a.shape[1:]), compress(flat, packing))
    return out, (source >= 0).reshape(batch, size)
