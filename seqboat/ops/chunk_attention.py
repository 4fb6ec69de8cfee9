"""Attention within chunks of a sequence (Ma et al. 2022, MEGA, arXiv 2209.10655, section 3.5).

Element t is in chunk floor(t / C) and reads the elements of that chunk alone, or those up to itself where causal. The
last chunk is filled up with elements that nobody reads. Weights are those of `window_attention.attend`, whose rows are
a chunk's: relu2 and Laplace divide the scores by the number of the chunk's valid elements or, causal, of those up to
the query.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqboat.ops.packing import RowInfo
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend


class ChunkMemory(NamedTuple):
    """Of B streams: the `keys` (B, C, Z) and `values` (B, C, E) of the chunk that each is in, and how many elements of
    it have come, `filled` (B,). Slots from there on are not read."""

    keys: Array
    values: Array
    filled: Array


def initial_memory(batch: int, chunk: int, key_size: int, value_size: int, dtype: jnp.dtype) -> ChunkMemory:
    zeros = lambda width: jnp.zeros((batch, chunk, width), dtype)
    return ChunkMemory(zeros(key_size), zeros(value_size), jnp.zeros(batch, jnp.int32))


def attend_chunks(
    window: Window,
    chunk: int | None,
    table: Float[Array, "P"],
    q: Float[Array, "B L Z"],
    k: Float[Array, "B L Z"],
    v: Float[Array, "B L E"],
    valid: Bool[Array, "B L"],
) -> Float[Array, "B L E"]:
    """Whole sequences in chunks of C elements, or in one with `chunk` None. `valid` elements come first."""
    if not valid.size:
        return v
    batch, length = valid.shape
    size = min(chunk or length, length)
    split = lambda x: _fill(x, size).reshape(-1, size, *x.shape[2:])
    index = jnp.arange(size, dtype=jnp.int32)

    def one(q, k, v, active):
        rows = RowInfo(jnp.zeros_like(index), index, index, jnp.full_like(index, active.sum()), active)
        return attend(window, table, q, k, v, rows, rows)

    out = jax.vmap(one)(*map(split, (q, k, v, valid)))
    return out.reshape(batch, -1, v.shape[2])[:, :length]


def stream_chunks(
    window: Window,
    table: Float[Array, "P"],
    memory: ChunkMemory,
    q: Float[Array, "B L Z"],
    k: Float[Array, "B L Z"],
    v: Float[Array, "B L E"],
    valid: Bool[Array, "B L"],
) -> tuple[Float[Array, "B L E"], ChunkMemory]:
    """Pieces of causal streams, each from where its `memory` is in a chunk, and the memory after their valid elements.

    Queries are computed C at a time. All that they may read is the memory or the C elements before, and themselves.
    """
    if not valid.size:
        return v, memory
    (batch, length), size = valid.shape, memory.keys.shape[1]
    block = min(size, length)
    fill = lambda x: _fill(x, block)
    slots = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (batch, size))
    place = memory.filled[:, None] + jnp.arange(fill(valid).shape[1], dtype=jnp.int32)[None]
    every = _rows(
        jnp.concatenate([slots, place], 1),
        jnp.concatenate([slots < memory.filled[:, None], fill(valid)], 1),
        size,
    )
    keys, values = (jnp.concatenate([old, fill(new)], 1) for old, new in ((memory.keys, k), (memory.values, v)))
    starts = block * np.arange(place.shape[1] // block)[:, None]
    near = lambda x: x[:, starts + np.arange(size + block)[None]]
    own = lambda x: x.reshape(batch, -1, block, *x.shape[2:])
    one = lambda q, k, v, query, key: attend(window, table, q, k, v, query, key)
    read = (own(fill(q)), near(keys), near(values))
    out = jax.vmap(jax.vmap(one))(*read, jax.tree.map(own, _rows(place, fill(valid), size)), jax.tree.map(near, every))
    return out.reshape(batch, -1, v.shape[2])[:, :length], _push(memory, k, v, place[:, :length], valid)


def _push(
    memory: ChunkMemory,
    k: Float[Array, "B L Z"],
    v: Float[Array, "B L E"],
    place: Int[Array, "B L"],
    valid: Bool[Array, "B L"],
) -> ChunkMemory:
    """Element t of a stream is stored in slot t mod C; of a piece, the last C at most."""
    size, count = memory.keys.shape[1], valid.sum(1, dtype=jnp.int32)
    kept = valid & (jnp.arange(valid.shape[1])[None] >= count[:, None] - size)
    slot, stream = jnp.where(kept, place % size, size), np.arange(len(valid))[:, None]
    write = lambda old, new: old.at[stream, slot].set(new.astype(old.dtype), mode="drop")
    return ChunkMemory(write(memory.keys, k), write(memory.values, v), (memory.filled + count) % size)


def _rows(place: Int[Array, "B T"], active: Bool[Array, "B T"], size: int) -> RowInfo:
    """Rows at these places, counted from the start of the chunk that each stream is in."""
    chunk, index = place // size, place % size
    return RowInfo(chunk, index, index, index + 1, active)


def _fill(x: Array, size: int) -> Array:
    """Zeros, or False, behind the elements of (B, L, ...), up to a multiple of `size`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)))
