"""What a causal layer keeps of a stream: of a size that does not grow, whatever came before.

States are trees whose leaves all begin with the B streams, and an empty one is zeros. So single streams are emptied and
copied by `reset` and `fork`, whatever the model.
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

# Longer pieces are packed; rows of shorter ones are computed in place. A memory has this many slots to spare.
MAX_IN_PLACE_LENGTH = 16
# Rows further back than this are remembered as if they were here: two positions and their difference fit in 32 bits.
FARTHEST = 2**30
# A length that no sequence has.
LONGEST = 2**31 - 1


def reset(state: Tree, which: ArrayLike | Sequence[bool]) -> Tree:
    """The state with those of the B streams empty for which `which` (B,) is True.

    Raises ValueError for what is not as many truth values, so for numbers of streams.
    """
    which, count = jnp.asarray(which), _count(state)
    if which.dtype != bool or which.shape != (count,):
        raise ValueError(f"which: {count} truth values are wanted, one a stream, not {which.dtype}{which.shape}")
    return jax.tree.map(lambda leaf: jnp.where(which.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf), state)


def fork(state: Tree, source: ArrayLike | Sequence[int]) -> Tree:
    """The state of S streams, each a copy of the one of those whose number `source` (S,) has: of [0, 0, 1] two are the
    first. Raises ValueError for what is no list of numbers, and, where they are known, for one of no stream; in a
    compiled program, which cannot raise, that one's state is NaN."""
    source, count = jnp.asarray(source), _count(state)
    if source.ndim != 1 or not jnp.issubdtype(source.dtype, jnp.integer):
        raise ValueError(f"source: a list of numbers of streams is wanted, not {source.dtype}{source.shape}")
    if not isinstance(source, jax.core.Tracer) and source.size and not 0 <= source.min() <= source.max() < count:
        raise ValueError(f"source: {source.tolist()} has numbers of no stream; there are 0..{count - 1}")
    nothing = lambda leaf: jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
    copy = lambda leaf: leaf.at[source].get(mode="fill", fill_value=nothing(leaf), wrap_negative_indices=False)
    return jax.tree.map(copy, jax.tree.map(jnp.asarray, state))


def _count(state: Tree) -> int:
    return len(jax.tree.leaves(state)[0])


class WorkingMemory(NamedTuple):
    """The last activated rows of B streams: rings of w + MAX_IN_PLACE_LENGTH slots. A row reads the last w before it.

    `rows`: what a `WindowedModule` projected, leaves (B, slots, ...). `position` (B, slots): where each stood, and
    `now` (B,): where the next element will stand, both modulo 2^32, which wraps around: only differences count.
    `pushed` (B,): how many rows there have been; once the ring is full, modulo its slots. The next writes over the
    oldest.
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
        """How many rows came after each slot's, and whether it has one."""
        age = (self.pushed[:, None] - 1 - np.arange(self.slots)[None]) % self.slots
        return age, age < self.pushed[:, None]

    def ordered(self) -> tuple["WorkingMemory", Bool[Array, "B w"]]:
        """The last w rows, the newest in the last slot; and which of them there are."""
        age = np.arange(self.window)[::-1][None]
        slot = (self.pushed[:, None] - 1 - age) % self.slots
        take = lambda leaf: jnp.take_along_axis(leaf, slot.reshape(*slot.shape, *[1] * (leaf.ndim - 2)), axis=1)
        there = self.pushed[:, None] > age
        return self._replace(rows=jax.tree.map(take, self.rows), position=take(self.position)), there

    def push(self, rows: Tree, position: Int[Array, "B R"], active: Bool[Array, "B R"]) -> "WorkingMemory":
        """The memory with those of these rows that are active, in their order; `now` is left to the caller.

        In place, where the memory is not used again: R rows are written, not all slots.
        """
        rank = jnp.cumsum(active, axis=1, dtype=jnp.int32)
        kept = active & (rank > rank[:, -1:] - self.slots)
        slot = jnp.where(kept, (self.pushed[:, None] + rank - 1) % self.slots, self.slots)
        stream = np.arange(len(active))[:, None]
        write = lambda leaf, new: leaf.at[stream, slot].set(new.astype(leaf.dtype), mode="drop")
        pushed = self.pushed + rank[:, -1]
        return WorkingMemory(
            jax.tree.map(write, self.rows, rows),
            write(self.now[:, None] - jnp.minimum(self.now[:, None] - self.position, FARTHEST), position),
            self.now,
            jnp.where(pushed < self.slots, pushed, self.slots + pushed % self.slots),
        )

    def remember(self, shown: Tree, position: Int[Array, "T"], place: Int[Array, "B L"]) -> "WorkingMemory":
        """The memory with what rows of a piece showed: those of every stream's elements that have a `place`."""
        # The last rows of every stream: places grow with the position, and -1 comes first.
        place = jnp.sort(place, axis=1)[:, -self.window :]
        last = jnp.maximum(place, 0)
        return self.push(jax.tree.map(lambda leaf: leaf[last], shown), position[last], place >= 0)


def empty(module: WindowedModule, batch: int, row: jax.ShapeDtypeStruct) -> WorkingMemory:
    """The memory of a module that has seen nothing; `row` (1, D). Raises ValueError for one that reads ahead, or rows
    without limit."""
    module = module.clone(parent=None)
    left, right = module.halo(LONGEST)
    if right:
        raise ValueError(f"{module.name} reads {right} rows ahead: only what reads earlier rows alone can be streamed")
    if left > LONGEST // 2:
        raise ValueError(f"{module.name} reads all earlier rows: to be streamed it needs a halo(length) with a bound")
    init = functools.partial(module.init_with_output, method="context")
    shown, _ = jax.eval_shape(init, jax.random.key(0), row, row_info(jnp.ones((1, 1), bool)))
    rows = jax.tree.map(lambda s: jnp.zeros((batch, left + MAX_IN_PLACE_LENGTH, *s.shape[1:]), s.dtype), shown)
    now, pushed = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)  # two: who donates a state, donates both
    return WorkingMemory(rows, jnp.zeros((batch, left + MAX_IN_PLACE_LENGTH), jnp.int32), now, pushed)


def around(memory: WorkingMemory, stretch: Stretch) -> Around:
    """A piece of each stream behind the rows that it remembers, of which m is zero."""
    remembered, there = memory.ordered()
    before = Stretch(
        jnp.zeros((*there.shape, stretch.m.shape[-1]), stretch.m.dtype),
        remembered.position,
        there,
        there,
        None if stretch.weight is None else jnp.ones(there.shape, stretch.weight.dtype),
    )
    return neighbours.join(before, stretch, None, remembered.rows)


def in_place(memory: WorkingMemory, active: Bool[Array, "B L"]) -> tuple[RowInfo, RowInfo, Int[Array, "B L"]]:
    """What attention may know of a short piece, and of the memory that its rows have been pushed to, leaves with the
    streams in front; and where the piece's elements stand."""
    position = memory.now[:, None] + np.arange(active.shape[1], dtype=np.int32)[None]
    rank = jnp.cumsum(active, axis=1, dtype=jnp.int32)
    age, there = memory.known()
    total = rank[:, -1:]
    own = RowInfo(jnp.zeros_like(rank), position, rank - active, jnp.broadcast_to(total, rank.shape), active)
    every = RowInfo(jnp.zeros_like(age), memory.position, total - 1 - age, jnp.broadcast_to(total, age.shape), there)
    return own, every, position
