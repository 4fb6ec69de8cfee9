"""The state of a causal layer for a stream, of constant size whatever the stream's length.

States are trees whose leaves have a leading axis of B streams; the initial state is zeros. So `reset` and `fork` empty
and copy single streams of any model.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int

from seqboat.layers.windowed import WindowedModule
from seqboat.ops import neighbours
from seqboat.ops.neighbours import Around, Stretch
from seqboat.ops.packing import RowInfo, row_info

Tree = Any

# Longer pieces are packed; shorter ones are computed in place. A memory has this many spare slots.
MAX_IN_PLACE_LENGTH = 16
# Rows further back are treated as if at this distance, so that differences of positions fit in 32 bits.
MAX_DISTANCE = 2**30
# An upper bound on the length of any sequence, to query a module's halo.
MAX_LENGTH = 2**31 - 1


def reset(state: Tree, which: ArrayLike | Sequence[bool]) -> Tree:
    """The state with every stream reset for which `which` (B,) is True.

    Raises ValueError unless `which` is an array of B booleans; indices of streams are rejected too.
    """
    which, count = jnp.asarray(which), _count(state)
    if which.dtype != bool or which.shape != (count,):
        raise ValueError(f"which: expected {count} booleans, one per stream, not {which.dtype}{which.shape}")
    return jax.tree.map(lambda leaf: jnp.where(which.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf), state)


def fork(state: Tree, source: ArrayLike | Sequence[int]) -> Tree:
    """The state of S streams, each a copy of the stream with index `source` (S,): source=[0, 0, 1] duplicates stream 0.
    Raises ValueError unless `source` is a list of integers and, outside jit where values are known, for an index out of
    range; a compiled program cannot raise, and gives that stream a state of NaN."""
    source, count = jnp.asarray(source), _count(state)
    if source.ndim != 1 or not jnp.issubdtype(source.dtype, jnp.integer):
        raise ValueError(f"source: expected a list of stream indices, not {source.dtype}{source.shape}")
    if not isinstance(source, jax.core.Tracer) and source.size and not 0 <= source.min() <= source.max() < count:
        raise ValueError(f"source: {source.tolist()} has indices out of range; streams are 0..{count - 1}")
    nothing = lambda leaf: jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
    copy = lambda leaf: leaf.at[source].get(mode="fill", fill_value=nothing(leaf), wrap_negative_indices=False)
    return jax.tree.map(copy, jax.tree.map(jnp.asarray, state))


def _count(state: Tree) -> int:
    return len(jax.tree.leaves(state)[0])


class WorkingMemory(NamedTuple):
    """The last activated rows of B streams: ring buffers of w + MAX_IN_PLACE_LENGTH slots. A row reads the last w
    before it.

    `rows` is a `WindowedModule`'s context, leaves (B, slots, ...). `position` (B, slots) is that of each row, and
    `now` (B,) that of the next element, both modulo 2^32 with wrap-around, since only differences matter. `pushed` (B,)
    counts the rows so far; once the ring is full, modulo its slots. The next row overwrites the oldest.
    """

    rows: Tree
    position: Array
    now: Array
    pushed: Array

    @property
    def slots(self) -> int:
        return self.position.shape[1]

    @property
    def window(self) -> int:
        return self.slots - MAX_IN_PLACE_LENGTH

    def known(self) -> tuple[Int[Array, "B slots"], Bool[Array, "B slots"]]:
        """How many rows came after that of each slot, and whether the slot is filled."""
        age = (self.pushed[:, None] - 1 - np.arange(self.slots)[None]) % self.slots
        return age, age < self.pushed[:, None]

    def ordered(self) -> tuple["WorkingMemory", Bool[Array, "B w"]]:
        """The last w rows, the newest in the last slot, and which slots are filled."""
        age = np.arange(self.window)[::-1][None]
        slot = (self.pushed[:, None] - 1 - age) % self.slots
        take = lambda leaf: jnp.take_along_axis(leaf, slot.reshape(*slot.shape, *[1] * (leaf.ndim - 2)), axis=1)
        there = self.pushed[:, None] > age
        return self._replace(rows=jax.tree.map(take, self.rows), position=take(self.position)), there

    def push(self, rows: Tree, position: Int[Array, "B R"], active: Bool[Array, "B R"]) -> "WorkingMemory":
        """The memory with the active ones of these rows appended in order; the caller updates `now`.

        Updates in place if the memory is not used again: R rows are written, not all slots.
        """
        rank = jnp.cumsum(active, axis=1, dtype=jnp.int32)
        kept = active & (rank > rank[:, -1:] - self.slots)
        slot = jnp.where(kept, (self.pushed[:, None] + rank - 1) % self.slots, self.slots)
        stream = np.arange(len(active))[:, None]
        write = lambda leaf, new: leaf.at[stream, slot].set(new.astype(leaf.dtype), mode="drop")
        pushed = self.pushed + rank[:, -1]
        return WorkingMemory(
            jax.tree.map(write, self.rows, rows),
            write(self.now[:, None] - jnp.minimum(self.now[:, None] - self.position, MAX_DISTANCE), position),
            self.now,
            jnp.where(pushed < self.slots, pushed, self.slots + pushed % self.slots),
        )

    def remember(self, shown: Tree, position: Int[Array, "T"], place: Int[Array, "B L"]) -> "WorkingMemory":
        """The memory with the exposed rows of a piece appended: those of every element that has a `place`."""
        # The last rows of every stream: `place` grows with the position, and -1 sorts first.
        place = jnp.sort(place, axis=1)[:, -self.window :]
        last = jnp.maximum(place, 0)
        return self.push(jax.tree.map(lambda leaf: leaf[last], shown), position[last], place >= 0)


def empty(module: WindowedModule, batch: int, row: jax.ShapeDtypeStruct) -> WorkingMemory:
    """The initial memory of a module; `row` (1, D) is an example of its input. Raises ValueError for a module that
    reads ahead, or reads an unbounded number of rows."""
    module = module.clone(parent=None)
    left, right = module.halo(MAX_LENGTH)
    if right:
        raise ValueError(
            f"{module.name} reads {right} rows ahead: only modules that read earlier rows alone can be streamed"
        )
    if left > MAX_LENGTH // 2:
        raise ValueError(f"{module.name} reads all earlier rows: streaming needs a halo(length) with a bound")
    init = functools.partial(module.init_with_output, method="context")
    shown, _ = jax.eval_shape(init, jax.random.key(0), row, row_info(jnp.ones((1, 1), bool)))
    rows = jax.tree.map(lambda s: jnp.zeros((batch, left + MAX_IN_PLACE_LENGTH, *s.shape[1:]), s.dtype), shown)
    now, pushed = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)  # two arrays, so that a state can be donated
    return WorkingMemory(rows, jnp.zeros((batch, left + MAX_IN_PLACE_LENGTH), jnp.int32), now, pushed)


def around(memory: WorkingMemory, stretch: Stretch) -> Around:
    """A piece of each stream, preceded by its remembered rows, for which m is zero."""
    remembered, there = memory.ordered()
    before = Stretch(
        jnp.zeros((*there.shape, stretch.m.shape[-1]), stretch.m.dtype),
        remembered.position,
        there,
        there,
        *jax.tree.map(lambda leaf: jnp.ones(there.shape, leaf.dtype), (stretch.weight, stretch.occupancy)),
    )
    return neighbours.join(before, stretch, None, remembered.rows)


def in_place(memory: WorkingMemory, active: Bool[Array, "B L"]) -> tuple[RowInfo, RowInfo, Int[Array, "B L"]]:
    """Row metadata of a short piece, and of the memory that its rows have been pushed to, with a leading axis of
    streams; and the slots of the piece's elements."""
    position = memory.now[:, None] + np.arange(active.shape[1], dtype=np.int32)[None]
    rank = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    age, there = memory.known()
    total = rank[:, -1:]
    own = RowInfo(jnp.zeros_like(rank), position, rank - active, jnp.broadcast_to(total, rank.shape), active)
    every = RowInfo(jnp.zeros_like(age), memory.position, total - 1 - age, jnp.broadcast_to(total, age.shape), there)
    return own, every, position
