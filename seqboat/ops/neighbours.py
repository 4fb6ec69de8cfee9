"""The rows that a module is computed on: those of a batch, and the surrounding ones that they may see.

A batch is full sequences, pieces of streams, or pieces of sequences split over devices. For pieces, the rows before and
after come from elsewhere (`layers.streaming.around`, `parallel.sequence.around`), in the same form.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqboat.ops.packing import RowInfo, row_info

Tree = Any


class Stretch(NamedTuple):
    """Consecutive elements of B sequences: `m` (B, S, D) and, each (B, S), their `position`, whether a module is
    `computed` there, whether others may `read` them, and the `weight` and `occupancy` with which they do
    (`ops.packing.RowInfo`)."""

    m: Array
    position: Array
    computed: Any
    read: Array
    weight: Array | None = None
    occupancy: Array | None = None


class Around(NamedTuple):
    """A stretch with a batch's `own` elements between those that they may see. `shown` is the context that the elements
    before them exposed, if it was kept, leaves (B, own.start, ...): then they are not computed again."""

    stretch: Stretch
    own: slice
    shown: Tree = None

    def rows(self) -> RowInfo:
        """Row metadata of every element; windows count those that are read with a weight above 1/2."""
        stretch = self.stretch
        read = stretch.computed & stretch.read
        if stretch.weight is None:
            rows = row_info(read)
        else:
            rows = row_info(read & (stretch.weight > 0.5))
            weight, occupancy = jax.tree.map(jnp.ravel, (stretch.weight, stretch.occupancy))
            rows = rows._replace(active=read.reshape(-1), weight=weight, occupancy=occupancy)
        return rows._replace(position=stretch.position.reshape(-1))

    def recall(self, seen: Tree, place: Array) -> Tree:
        """The rows that a module exposes, with those of earlier elements inserted at their `place` (B, S), or -1."""
        if self.shown is None:
            return seen
        place = place[:, : self.own.start]
        put = lambda leaf, old: leaf.at[jnp.where(place < 0, leaf.shape[0], place)].set(
            old.astype(leaf.dtype), mode="drop"
        )
        return jax.tree.map(put, seen, self.shown)


def own(m: Float[Array, "B L D"], active: Bool[Array, "B L"], start: Any = 0) -> Stretch:
    """The elements of a batch, computed where active; `start` () or (B, 1) is the first position."""
    position = jnp.broadcast_to(np.arange(m.shape[1], dtype=np.int32)[None] + start, active.shape)
    return Stretch(m, position, active, active)


def alone(stretch: Stretch) -> Around:
    """Full sequences, with nothing around them."""
    return Around(stretch, slice(0, stretch.m.shape[1]))


def join(before: Stretch | None, stretch: Stretch, after: Stretch | None, shown: Tree = None) -> Around:
    parts = [part for part in (before, stretch, after) if part is not None]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
    left = 0 if before is None else before.m.shape[1]
    return Around(joined, slice(left, left + stretch.m.shape[1]), shown)
