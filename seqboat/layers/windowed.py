"""The contract of a module whose rows see their neighbours among the activated rows."""

import flax.linen as nn
from jaxtyping import Array

from seqboat.ops.packing import RowInfo


class WindowedModule(nn.Module):
    """A module whose rows see their neighbours among the activated rows. Subclasses define:

    `halo(length) -> (left, right)`: how many packed rows on each side a row may see, in sequences of this length;
    `context(x, rows) -> halo`: row-wise, from (T, D) rows to a tree of rows: what a row exposes to its neighbours;
    `mix(x, halo, rows, halo_rows) -> y`: own rows and the halo around them to (T, D). The halo also has rows of other
    sequences: `rows` and `halo_rows` (`ops.packing.RowInfo`) say which may be seen.

    Of a short piece of a stream, `context` and `mix` are computed apart, and each reads the parameters that it needs. A
    module whose `projects_once()` is True also defines `project(x, rows) -> (halo, own)`: what `context` returns, and a
    tree of rows that `mix(x, halo, rows, halo_rows, own)` takes in order not to compute it again.

    A module may also define mix in three parts, the middle one over all packed rows at once, of which `blocks` are
    filled:
    `query(x, rows) -> q`, row-wise;
    `mix_packed(q, halo, rows, blocks) -> mixed`;
    `finish(x, mixed) -> y`, row-wise.
    They are used where `mixes_packed(every)` is True. With `every` all blocks are computed, as on accelerators, where
    the three parts take fewer operations; without, a loop of `mix` over the filled blocks takes less memory.
    """

    def projects_once(self) -> bool:
        return False

    def mixes_packed(self, every: bool) -> bool:
        return False

    def halo(self, length: int) -> tuple[int, int]:
        raise NotImplementedError

    def context(self, x: Array, rows: RowInfo) -> dict:
        raise NotImplementedError

    def mix(self, x: Array, halo: dict, rows: RowInfo, halo_rows: RowInfo) -> Array:
        raise NotImplementedError
