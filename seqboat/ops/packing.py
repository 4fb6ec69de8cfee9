"""Active rows of a batch as one packed sequence.

The batch is flattened to B L rows. Its active rows, in order, fill the first slots of a packed array; the rest stays
empty. Nothing is dropped at any activation rate, and the cost scales with the number of filled slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Tree = Any


class Packing(NamedTuple):
    """Maps between rows and slots: `source` (T,) slot -> row, or -1; `slot` (B L,) row -> slot, or -1; `filled` ()
    slots.

    T is a whole number of blocks, plus a margin of empty slots on each side.
    """

    source: Array
    slot: Array
    filled: Array


class RowInfo(NamedTuple):
    """Metadata of each row for attention, packed or not, each (T,).

    `segment`: its sequence in the batch. `position`: its index there. `rank`: the number of active rows before it in
    its sequence. `total`: the number of active rows in its sequence. `active`: whether it may be read. `weight`: its
    weight as a key, or None for 1. `occupancy`: the same number, whose gradient is that of taking a slot of others'
    windows, or None if that has none.
    """

    segment: Array
    position: Array
    rank: Array
    total: Array
    active: Array
    weight: Array | None = None
    occupancy: Array | None = None


def pack(
    active: Bool[Array, "B L"], block_size: int, *, left: int = 0, right: int = 0, room: int | None = None
) -> Packing:
    """Assign slots to the active rows by one cumulative sum and one scatter of indices; the first gets slot `left`.

    At most `room` rows may be active, by default all. T is `room` rounded up to whole blocks, and the margins.
    """
    flat = active.reshape(-1)
    capacity = left + -(-(flat.shape[0] if room is None else room) // block_size) * block_size + right
    slot = left - 1 + jnp.cumsum(flat, dtype=jnp.int32)
    source = jnp.full(capacity, -1, jnp.int32)
    source = source.at[jnp.where(flat, slot, capacity)].set(
        jnp.arange(flat.shape[0], dtype=jnp.int32), mode="drop", unique_indices=False
    )
    filled = slot[-1] + 1 - left if flat.size else jnp.zeros((), jnp.int32)
    return Packing(source, jnp.where(flat, slot, -1), filled)


def row_info(active: Bool[Array, "B L"]) -> RowInfo:
    """The metadata of every row of a flattened batch, unpacked."""
    batch, length = active.shape
    rank = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    total = jnp.broadcast_to(rank[:, -1:], active.shape)
    segment, position = np.divmod(np.arange(batch * length, dtype=np.int32), np.int32(max(length, 1)))
    return RowInfo(
        jnp.asarray(segment), jnp.asarray(position), (rank - active).reshape(-1), total.reshape(-1), active.reshape(-1)
    )


def compress(tree: Tree, packing: Packing) -> Tree:
    """Rows (B L, ...) of every leaf to slots (T, ...); empty slots are zero."""
    return jax.tree.map(lambda x: _move(x, packing.source, packing.slot), tree)


def extract(tree: Tree, packing: Packing) -> Tree:
    """Slots (T, ...) of every leaf back to rows (B L, ...); inactive rows are zero."""
    return jax.tree.map(lambda x: _move(x, packing.slot, packing.source), tree)


@jax.custom_vjp
def _move(x: Array, index: Int[Array, "M"], inverse: Int[Array, "N"]) -> Array:
    """x[index], zero where index is -1. Its transpose is a gather by the inverse, which avoids a scatter."""
    if not x.shape[0]:
        return jnp.zeros((index.shape[0], *x.shape[1:]), x.dtype)
    chosen = (index >= 0).reshape(index.shape[0], *[1] * (x.ndim - 1))
    return jnp.where(chosen, x[jnp.maximum(index, 0)], jnp.zeros((), x.dtype))


def _move_forward(x, index, inverse):
    return _move(x, index, inverse), (index, inverse)


def _move_backward(indices, cotangent):
    index, inverse = indices
    return _move(cotangent, inverse, index), None, None


_move.defvjp(_move_forward, _move_backward)
