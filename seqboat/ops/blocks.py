"""Functions over a data-dependent number of blocks of packed rows (`ops.packing`)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Tree = Any


class Blocks(NamedTuple):
    """Packed rows cut into blocks of `block_size`, between margins of `left` and `right` empty rows.

    The first `filled` () rows after the left margin are filled. A block reads its own rows, `left` rows before and
    `right` rows after them. `blocks_per_iteration` blocks are computed at once, batched: more work for an accelerator
    between loop conditions, at the cost of up to that many empty blocks. `wanted` marks the rows whose results are
    used, None for all. `every`: all blocks are computed, so that the number of iterations is known to the compiler.
    """

    filled: Int[Array, ""]
    block_size: int
    left: int = 0
    right: int = 0
    blocks_per_iteration: int = 1
    wanted: Bool[Array, "T"] | None = None
    every: bool = False

    def at_once(self, number: int) -> "Blocks":
        """The same rows in blocks of `number` times the size, one per iteration."""
        return self._replace(block_size=number * self.block_size, blocks_per_iteration=1)


def map_blocks(fn: Callable[[Tree, Tree, Tree], Tree], params: Tree, own: Tree, halo: Tree, blocks: Blocks) -> Tree:
    """`fn(params, own block, halo block)` over the blocks that hold the first `filled` rows; 0 everywhere else.

    Leaves of `own` and `halo` have T rows: the margins, and between them a whole number of iterations. A block sees its
    own `block_size` rows of `own`, and of `halo` also the rows around them. `fn` returns a tree with `block_size` rows
    per leaf; the result has margins too, of zeros. The number of blocks is data-dependent, so the cost scales with
    `filled`, and `fn` must not mix a row with empty ones (pass it a leaf that tells them apart). Iterations without a
    `wanted` row are skipped.

    The gradient runs over the same blocks, recomputes `fn` on each and transposes it: only the arguments are stored.
    Integer and boolean leaves get no gradient. `fn` must not close over traced arrays.
    """
    if blocks.blocks_per_iteration > 1:
        fn, blocks = functools.partial(_batched, blocks, fn), blocks.at_once(blocks.blocks_per_iteration)
    leaves = jax.tree.leaves((own, halo))
    total, size, margins = leaves[0].shape[0], blocks.block_size, blocks.left + blocks.right
    if (total - margins) % size or any(leaf.shape[0] != total for leaf in leaves):
        between = f" between margins of {blocks.left} and {blocks.right}" if margins else ""
        rows = [leaf.shape[0] for leaf in leaves]
        raise ValueError(f"rows {rows} are not the same whole number of blocks of {size}{between}")
    if total == margins:  # no blocks
        long = lambda tree, size: jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), tree)
        shapes = jax.eval_shape(fn, params, long(own, size), long(halo, size + margins))
        return jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), shapes)
    floats, rest, merge = split_floats((params, own, halo))
    number, order = (blocks.filled + size - 1) // size, None
    loop = _Loop(fn, merge, total, size, blocks.left, blocks.right, blocks.every)
    if blocks.wanted is not None:
        used = blocks.wanted[blocks.left : total - blocks.right].reshape(-1, size).any(1)
        number, order = used.sum(), jnp.argsort(~used, stable=True)
    return _run(loop, floats, rest, number, order)


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """What is static about a loop: see `map_blocks`. `merge` puts the float leaves and the others together."""

    fn: Callable
    merge: Callable
    total: int
    size: int
    left: int
    right: int
    every: bool

    def each(self, number: Array, order: Array | None, step: Callable[[Array, Tree], Tree], start: Tree) -> Tree:
        """`step` for every block that is computed: the first `number` blocks, or those that are first in `order`."""
        last = (self.total - self.left - self.right) // self.size if self.every else number
        return jax.lax.fori_loop(0, last, lambda i, carry: step(i if order is None else order[i], carry), start)

    def read(self, tree: Tree, index: Array) -> Tree:
        """A block's own rows."""
        first = self.left + index * self.size
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, self.size), tree)

    def read_around(self, tree: Tree, index: Array) -> Tree:
        """A block's own rows and those around them."""
        size = self.left + self.size + self.right
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index * self.size, size), tree)

    def arguments(self, trees: tuple[Tree, Tree, Tree], index: Any) -> tuple[Tree, Tree, Tree]:
        """The part of (params, own, halo) that a block takes."""
        params, own, halo = trees
        return params, self.read(own, index), self.read_around(halo, index)

    def transpose(self, floats: Tree, rest: Tree, cotangent: Tree) -> Tree:
        """The gradient of a block's arguments."""
        value = lambda floats: split_floats(self.fn(*self.merge(floats, rest)))[0]
        return jax.vjp(value, floats)[1](cotangent)[0]


def _write(tree: Tree, first: Array, update: Tree) -> Tree:
    return jax.tree.map(lambda a, u: jax.lax.dynamic_update_slice_in_dim(a, u, first, 0), tree, update)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(loop: _Loop, floats: Tree, rest: Tree, number: Array, order: Array | None) -> Tree:
    block = lambda i: loop.fn(*loop.merge(loop.arguments(floats, i), loop.arguments(rest, i)))
    out = jax.tree.map(lambda s: jnp.zeros((loop.total, *s.shape[1:]), s.dtype), jax.eval_shape(block, 0))
    return loop.each(number, order, lambda i, out: _write(out, loop.left + i * loop.size, block(i)), out)


def _forward(loop: _Loop, *args: Any) -> tuple[Tree, tuple]:
    return _run(loop, *args), args


def _backward(loop: _Loop, saved: tuple, cotangent: Tree) -> tuple:
    floats, rest, number, order = saved
    cotangent, _, _ = split_floats(cotangent)

    def step(i, gradient):
        own = loop.arguments(floats, i), loop.arguments(rest, i), loop.read(cotangent, i)
        d_params, d_own, d_halo = loop.transpose(*own)
        params, own, halo = gradient
        return (
            jax.tree.map(jnp.add, params, d_params),
            _write(own, loop.left + i * loop.size, d_own),
            _write(halo, i * loop.size, jax.tree.map(jnp.add, loop.read_around(halo, i), d_halo)),
        )

    return loop.each(number, order, step, jax.tree.map(jnp.zeros_like, floats)), None, None, None


_run.defvjp(_forward, _backward)


def _batched(blocks: Blocks, fn: Callable, params: Tree, own: Tree, halo: Tree) -> Tree:
    """`fn` on N consecutive blocks at once, each with its own part of the halo.

    The parts overlap. They are joined from one view per block of margin instead of one slice per part: a window of 1024
    rows takes 9 views, however large N is, and as many in the gradient.
    """

    number, block_size = blocks.blocks_per_iteration, blocks.block_size

    def windows(a, size):
        views = -(-size // block_size)
        short = (number + views - 1) * block_size - a.shape[0]
        a = jnp.pad(a, [(0, short), *[(0, 0)] * (a.ndim - 1)]) if short else a
        a = a.reshape(-1, block_size, *a.shape[1:])
        return jnp.concatenate([a[first : first + number] for first in range(views)], axis=1)[:, :size]

    own = jax.tree.map(lambda a: windows(a, block_size), own)
    halo = jax.tree.map(lambda a: windows(a, blocks.left + block_size + blocks.right), halo)
    out = jax.vmap(fn, in_axes=(None, 0, 0))(params, own, halo)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def switch(index: Int[Array, ""], branches: Sequence[Callable[..., Tree]], *args: Tree) -> Tree:
    """`branches[index](*args)`, whose gradient recomputes the branch: only the arguments are stored.

    `jax.lax.switch` would store what every branch wants to keep. Integer and boolean leaves get no gradient. Branches
    must not close over traced arrays.
    """
    floats, rest, merge = split_floats(args)

    def choose(index, make: Callable[[Callable], Callable], *args):
        return jax.lax.switch(index, [make(branch) for branch in branches], *args)

    @jax.custom_vjp
    def run(floats, rest, index):
        return choose(index, lambda branch: lambda floats, rest: branch(*merge(floats, rest)), floats, rest)

    def forward(floats, rest, index):
        return run(floats, rest, index), (floats, rest, index)

    def backward(saved, cotangent):
        floats, rest, index = saved

        def transpose(branch):
            value = lambda floats, rest: split_floats(branch(*merge(floats, rest)))[0]
            return lambda floats, rest, cotangent: jax.vjp(lambda f: value(f, rest), floats)[1](cotangent)[0]

        return choose(index, transpose, floats, rest, split_floats(cotangent)[0]), None, None

    run.defvjp(forward, backward)
    return run(floats, rest, index)


def split_floats(tree: Tree) -> tuple[Tree, Tree, Callable[[Tree, Tree], Tree]]:
    """The tree's float leaves, its other leaves, and a function that puts them together."""

    def is_float(leaf):
        return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)

    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, tree)
    rest = jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, tree)

    def merge(floats, rest):
        return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda leaf: leaf is None)

    return floats, rest, merge
