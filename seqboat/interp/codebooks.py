"""Codebooks: a vector becomes the sum of the k codes nearest to it (Tamkin et al. 2023, arXiv 2310.17230).

A table has C = codes for each of G groups of channels: x (*B, W) is cut into G parts of W / G channels, and every part
takes codes of its own. With k = 1 the nearest is that of the least Euclidean distance; with k > 1 the codes have the
greatest cosines, and their sum takes the place of x. `seqboat.models.bottlenecked` trains them in a model.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from seqboat.interp.edits import Edit

Table = Float[Array, "G C V"]
Vectors = Float[Array, "*B W"]
Ids = Int[Array, "*B G k"]

# Rows of k-means whose distances are computed at once.
BLOCK = 4096


def nearest(x: Vectors, table: Table, k: int = 1) -> Ids:
    """The numbers of the k codes of every group that are nearest to x, the nearest first; all different.

    Raises ValueError if the groups do not make up the width of x, and if there are fewer than k codes.
    """
    groups, codes, width = table.shape
    if groups * width != x.shape[-1]:
        raise ValueError(f"a codebook of {groups} groups of {width} channels at a value of {x.shape[-1]}")
    if not 1 <= k <= codes:
        raise ValueError(f"k={k}: must be in 1..{codes}, the codes")
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, width)
    products, squares = jnp.einsum("...gv,gcv->...gc", parts, table), jnp.square(table).sum(-1)
    if k == 1:  # |x - c|^2 is least where <x, c> - |c|^2 / 2 is greatest
        scores = products - jnp.broadcast_to(squares / 2, products.shape)
        return jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.int32)
    norms = jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
    cosines = products / jnp.broadcast_to(norms, products.shape)

    def take(left: Array, _: None) -> tuple[Array, Array]:
        chosen = jnp.argmax(left, axis=-1)
        return jnp.where(jax.nn.one_hot(chosen, codes, dtype=bool), -jnp.inf, left), chosen

    # By k maxima: a sort is slow on a CPU.
    _, chosen = jax.lax.scan(take, cosines, length=k)
    return jnp.moveaxis(chosen, 0, -1).astype(jnp.int32)


def decode(table: Table, ids: Ids) -> Vectors:
    """The sum of the codes of every group, the groups one after the other."""
    groups = jnp.broadcast_to(jnp.arange(len(table))[:, None], ids.shape)
    parts = table[groups, ids].sum(-2)
    return parts.reshape(*parts.shape[:-2], -1)


def quantize(x: Vectors, table: Table, k: int = 1) -> Vectors:
    """x^ = decode(table, nearest(x)), straight through: an output gradient g is the gradient of x, and of every code
    that was taken.  dx = g,  dtable[i] += g."""
    # Saved under rematerialisation, so that the search is not repeated.
    ids = checkpoint_name(nearest(jax.lax.stop_gradient(x), table, k), "codes")
    return decode(table, ids).astype(x.dtype) + (x - jax.lax.stop_gradient(x))


class Codebook(Edit):
    """x -> the sum of the `k` codes of a `table` (G, C, W / G) that are nearest to it (`quantize`)."""

    table: Any
    k: int = flax.struct.field(pytree_node=False, default=1)

    def change(self, x: Array) -> Array:
        return quantize(x, self.table, self.k)

    def decode(self, ids: Array) -> Array:
        """The value of codes that are named, (*B, G, k)."""
        return decode(self.table, ids)


@functools.partial(jax.jit, static_argnames=("codes", "rounds"))
def kmeans(x: Float[Array, "N V"], codes: int, key: Array, rounds: int = 10) -> Float[Array, "C V"]:
    """The means of `codes` clusters of rows, by `rounds` of Lloyd's algorithm.

    They start from rows drawn one after the other with the probability of their squared distance to the nearest before
    (k-means++; Arthur and Vassilvitskii 2007). Raises ValueError for fewer rows than codes.
    """
    if not 1 <= codes <= len(x):
        raise ValueError(f"codes={codes}: must be in 1..{len(x)}, the rows")

    def draw(state: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        distances, row = state
        distances = jnp.minimum(distances, jnp.square(x - row[None]).sum(1))
        total = jnp.cumsum(distances)
        place = jnp.searchsorted(total, jax.random.uniform(key) * total[-1], side="right")
        return (distances, x[jnp.minimum(place, len(x) - 1)]), row

    def assign(means: Array, row: Array) -> Array:
        return jnp.argmax(means @ row - jnp.square(means).sum(-1) / 2)

    def improve(means: Array, _: None) -> tuple[Array, None]:
        ids = jax.lax.map(functools.partial(assign, means), x, batch_size=min(BLOCK, len(x)))
        counts = jax.ops.segment_sum(jnp.ones(len(x)), ids, codes)[:, None]
        sums = jax.ops.segment_sum(x, ids, codes)
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), means), None

    first, others = jax.random.split(key)
    begin = (jnp.full(len(x), jnp.inf), x[jax.random.randint(first, (), 0, len(x))])
    _, start = jax.lax.scan(draw, begin, jax.random.split(others, codes))
    return jax.lax.scan(improve, start, length=rounds)[0]
