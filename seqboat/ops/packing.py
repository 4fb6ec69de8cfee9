"""Active rows of a batch as one packed sequence, and functions over a data-dependent number of blocks of it.

The batch is flattened to B L rows. Its active rows, in order, fill the first slots of a packed array; the rest stays
empty. Nothing is dropped at any activation rate, and the cost scales with the number of filled slots.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Tree = Any


class Packing(NamedTuple):
    """Maps between rows and slots: `source` (T,) slot -> row, or -1; `slot` (B L,) row -> slot, or -1; `filled` ()
    slots.

    T is B L rounded up to whole blocks, plus a margin of empty slots on each side.
    """

    source: Array
    slot: Array
    filled: Array


class RowInfo(NamedTuple):
    """Metadata of each row for attention, packed or not, each (T,).

    `segment`: its sequence in the batch. `position`: its index there. `rank`: the number of active rows before it in
    its sequence. `total`: the number of active rows in its sequence. `active`: whether it may be read. `weight`: its
    weight as a key, or None for 1.
    """

    segment: Array
    position: Array
    rank: Array
    total: Array
    active: Array
    weight: Array | None = None


def pack(active: Bool[Array, "B L"], block_size: int, *, left: int = 0, right: int = 0) -> Packing:
    """Assign slots to the active rows by one cumulative sum and one scatter of indices; the first gets slot `left`."""
    flat = active.reshape(-1)
    capacity = left + -(-flat.shape[0] // block_size) * block_size + right
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


def map_blocks(
    fn: Callable[[Tree, Tree, Tree], Tree],
    params: Tree,
    own: Tree,
    halo: Tree,
    count: Int[Array, ""],
    *,
    block_size: int,
    left: int = 0,
    right: int = 0,
    blocks_per_iteration: int = 1,
    wanted: Bool[Array, "T"] | None = None,
) -> Tree:
    """`fn(params, own block, halo block)` over the blocks that hold the first `count` rows; 0 everywhere else.

    Leaves of `own` and `halo` have T rows: a margin of `left` rows, a whole number of blocks, a margin of `right` rows.
    A block sees its own `block_size` rows of `own`, and of `halo` also `left` rows before and `right` rows after them.
    `fn` returns a tree with `block_size` rows per leaf; the result has margins too, of zeros. The number of blocks is
    data-dependent, so the cost scales with `count`, and `fn` must not mix a row with empty ones (pass it a leaf that
    tells them apart). An iteration of the loop computes `blocks_per_iteration` blocks at once, batched: more work for
    an accelerator between loop conditions, at the cost of up to that many empty blocks. The rows must then be a whole
    number of iterations. `wanted` marks the rows whose results are used: iterations without one are skipped.

    The gradient runs over the same blocks, recomputes `fn` on each and transposes it: only the arguments are stored.
    Integer and boolean leaves get no gradient. `fn` must not close over traced arrays.
    """
    if blocks_per_iteration > 1:
        fn = functools.partial(_batched, fn, blocks_per_iteration, block_size, left + right)
        block_size *= blocks_per_iteration
    leaves = jax.tree.leaves((own, halo))
    total = leaves[0].shape[0]
    if (total - left - right) % block_size or any(leaf.shape[0] != total for leaf in leaves):
        margins = f" between margins of {left} and {right}" if left or right else ""
        rows = [leaf.shape[0] for leaf in leaves]
        raise ValueError(f"rows {rows} are not the same whole number of blocks of {block_size}{margins}")
    if total == left + right:  # no blocks
        long = lambda tree, size: jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), tree)
        shapes = jax.eval_shape(fn, params, long(own, block_size), long(halo, left + block_size + right))
        return jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), shapes)
    blocks, order = (count + block_size - 1) // block_size, None
    if wanted is not None:
        used = wanted[left : total - right].reshape(-1, block_size).any(1)
        blocks, order = used.sum(), jnp.argsort(~used, stable=True)
    float_part, rest, merge = _split_floats((params, own, halo))

    def read(tree, index):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, left + index * block_size, block_size), tree)

    def read_around(tree, index):
        size = left + block_size + right
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index * block_size, size), tree)

    def write(tree, first, update):
        return jax.tree.map(lambda a, u: jax.lax.dynamic_update_slice_in_dim(a, u, first, 0), tree, update)

    def block_of(trees, index):
        params, own, halo = trees
        return params, read(own, index), read_around(halo, index)

    def apply(floats, rest):
        return fn(*merge(floats, rest))

    def block_index(i, order):
        return i if order is None else order[i]

    @jax.custom_vjp
    def run(floats, rest, blocks, order):
        shapes = jax.eval_shape(apply, block_of(floats, 0), block_of(rest, 0))
        out = jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), shapes)

        def step(i, out):
            i = block_index(i, order)
            return write(out, left + i * block_size, apply(block_of(floats, i), block_of(rest, i)))

        return jax.lax.fori_loop(0, blocks, step, out)

    def forward(floats, rest, blocks, order):
        return run(floats, rest, blocks, order), (floats, rest, blocks, order)

    def backward(saved, cotangent):
        floats, rest, blocks, order = saved
        cotangent, _, _ = _split_floats(cotangent)

        def step(i, gradient):
            i = block_index(i, order)
            constants = block_of(rest, i)
            _, transpose = jax.vjp(lambda f: _split_floats(apply(f, constants))[0], block_of(floats, i))
            (d_params, d_own, d_halo) = transpose(read(cotangent, i))[0]
            params, own, halo = gradient
            return (
                jax.tree.map(jnp.add, params, d_params),
                write(own, left + i * block_size, d_own),
                write(halo, i * block_size, jax.tree.map(jnp.add, read_around(halo, i), d_halo)),
            )

        return jax.lax.fori_loop(0, blocks, step, jax.tree.map(jnp.zeros_like, floats)), None, None, None

    run.defvjp(forward, backward)
    return run(float_part, rest, blocks, order)


def _batched(fn, blocks: int, block_size: int, margins: int, params: Tree, own: Tree, halo: Tree) -> Tree:
    """`fn` on N consecutive blocks at once, each with its own part of the halo.

    The parts overlap. They are joined from one view per block of margin instead of one slice per part: a window of 1024
    rows takes 9 views, however large N is, and as many in the gradient.
    """

    def windows(a, size):
        extra = -(-size // block_size) - 1
        rows = (blocks + extra) * block_size
        a = jnp.pad(a, [(0, rows - a.shape[0]), *[(0, 0)] * (a.ndim - 1)])
        a = a.reshape(-1, block_size, *a.shape[1:])
        return jnp.concatenate([a[first : first + blocks] for first in range(extra + 1)], axis=1)[:, :size]

    own = jax.tree.map(lambda a: windows(a, block_size), own)
    halo = jax.tree.map(lambda a: windows(a, block_size + margins), halo)
    out = jax.vmap(fn, in_axes=(None, 0, 0))(params, own, halo)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def _split_floats(tree: Tree) -> tuple[Tree, Tree, Callable[[Tree, Tree], Tree]]:
    """The tree's float leaves, its other leaves, and a function that puts them together."""

    def is_float(leaf):
        return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)

    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, tree)
    rest = jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, tree)

    def merge(floats, rest):
        return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda leaf: leaf is None)

    return floats, rest, merge
