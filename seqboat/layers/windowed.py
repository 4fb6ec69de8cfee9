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

    A module whose `keeps()` is True also defines `mix_keeping(x, halo, rows, halo_rows, known=None) -> (y, kept)`. The
    tree of rows `kept` is stored, and is `known` in the backward pass, which then need not compute it again.

    A module whose `mixes_packed()` is True also defines mix in three parts, the middle one over all packed rows at
    once, of which `blocks` are filled:
    `query(x, rows) -> q`, row-wise;
    `mix_packed(q, halo, rows, blocks) -> mixed`;
    `finish(x, mixed) -> y`, row-wise.
    Of a module with both, loops of unknown length use the former, which takes less memory, and accelerators the latter.
    """

    def mixes_packed(self) -> bool:
        return False

    def keeps(self) -> bool:
        return False

    def halo(self, length: int) -> tuple[int, int]:
        raise NotImplementedError

    def context(self, x: Array, rows: RowInfo) -> dict:
        raise NotImplementedError

    def mix(self, x: Array, halo: dict, rows: RowInfo, halo_rows: RowInfo) -> Array:
        raise NotImplementedError
