"""Which elements an activated element sees, and how it weighs them: what every form of the attention shares."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.ops import positions
from seqboat.ops.packing import RowInfo

AttentionFunction = Literal["softmax", "relu2", "laplace"]
PositionKind = Literal["none", "relative", "slot", "rotary", "t5"]

# Laplace approximates relu2: equal value and slope at sqrt(2) (Ma et al. 2022, section 3.4).
LAPLACE_MEAN = math.sqrt(0.5)
LAPLACE_DEVIATION = math.sqrt(0.25 / math.pi)


class Eviction(NamedTuple):
    """On one side of each query, (Q, J): the keys that have a `slot` of its window if active, the active key that
    `enters` the window when one of these is switched off, and the one that `leaves` it when one is switched on."""

    slot: Array
    enters: Array
    leaves: Array


@dataclasses.dataclass(frozen=True)
class Window:
    """How activated elements see one another. `size` None: all of the same sequence (SeqBoat-full)."""

    size: int | None
    causal: bool
    function: AttentionFunction
    position: PositionKind

    def halo(self, length: int) -> tuple[int, int]:
        """How many packed rows before and after its own a block of rows of sequences of this length may read."""
        reach = length - 1 if self.size is None else min(self.size, length - 1)
        return reach, 0 if self.causal else reach

    def visible(self, query: RowInfo, key: RowInfo) -> Bool[Array, "Q J"]:
        """Which keys each query reads."""
        see = key.active[None, :] & (query.segment[:, None] == key.segment[None, :])
        if self.causal:
            see &= query.position[:, None] - key.position[None, :] >= 0  # positions may wrap around
        if self.size is not None:
            see &= jnp.abs(query.rank[:, None] - key.rank[None, :]) <= self.size
        return see

    def evictions(self, query: RowInfo, key: RowInfo) -> Iterator[Eviction]:
        """What switching a key does to the windows of active queries: for the keys before a query and, unless causal,
        those after it. A query's own key takes no slot of its window. Raises ValueError without a `size`."""
        if self.size is None:
            raise ValueError("without a window size no key is evicted")
        present = key.active[None, :] & (query.segment[:, None] == key.segment[None, :])
        active = jnp.asarray(key.weight)[None, :] > 0.5
        before = query.rank[:, None] - key.rank[None, :]
        # An inactive key before a query, once active, is one slot farther away, since it counts in the query's rank.
        sides = [(before, before + ~active), (-before, -before)]
        for distance, slot in sides[: 1 if self.causal else 2]:
            yield Eviction(
                present & (slot >= 1) & (slot <= self.size),
                present & active & (distance == self.size + 1),
                present & active & (distance == self.size),
            )

    def apply_rotary(self, x: Float[Array, "T Z"], rows: RowInfo) -> Float[Array, "T Z"]:
        """Queries or keys as `attend` wants them: turned by their positions, if those are rotary."""
        return positions.rotate(x, rows.position) if self.position == "rotary" else x

    def scale(self, query: RowInfo, key_size: int) -> Array | float:
        """What queries are multiplied by: Z^-1/2 for softmax, else one over the number of keys in reach."""
        if self.function == "softmax":
            return key_size**-0.5
        if self.size is not None:
            return 1.0 / (self.size if self.causal else 2 * self.size)
        keys = query.rank + 1 if self.causal else jnp.maximum(query.total, 1)
        return 1.0 / keys[:, None].astype(jnp.float32)

    def bias(self, table: Float[Array, "P"], query: RowInfo, key: RowInfo) -> Float[Array, "Q J"]:
        """The bias of every pair, for the kinds that have a table."""
        if self.position == "relative":
            return positions.relative_bias(table, query.position, key.position)
        if self.position == "slot" and self.size is not None:
            return positions.slot_bias(table, query.rank, key.rank, self.size)
        return positions.t5_bias(table, query.position, key.position, self.causal)

    def scores(self, table: Float[Array, "P"] | None, q: Array, k: Array, query: RowInfo, key: RowInfo) -> Array:
        """s_ij = scale q_i . k_j + bias_ij of every pair (Q, J), visible or not, in float32."""
        q = (q.astype(jnp.float32) * self.scale(query, q.shape[-1])).astype(q.dtype)
        scores = jnp.einsum("qz,jz->qj", q, k, preferred_element_type=jnp.float32)
        return scores if table is None else scores + self.bias(table.astype(jnp.float32), query, key)

    def phi(self, scores: Float[Array, "Q J"]) -> Float[Array, "Q J"]:
        """max(s, 0)^2, or Laplace 0.5 (1 + erf((s - mean) / (deviation sqrt 2)))."""
        if self.function == "relu2":
            return jnp.square(jax.nn.relu(scores))
        return 0.5 * (1 + jax.lax.erf((scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))))
