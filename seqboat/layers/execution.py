"""Execution of a module at the active elements of a batch: over all rows (dense), over packed rows, or in place.

    program = functional(module, ...)                     the module as a pure function
    result, taps, memory = run(program, stretch, how, memory)

`dense` computes every row and masks: the reference. `packed` computes blocks of active rows, as many as there are, in
loops. The host of a GPU would read their conditions, so on accelerators it becomes `switched`: all rows of the smallest
of some capacities that holds the active ones. `in_place` is for short pieces of streams.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqboat.layers import streaming
from seqboat.layers.streaming import WorkingMemory
from seqboat.layers.windowed import WindowedModule
from seqboat.modules import check_rows, describe_module, modes
from seqboat.ops import neighbours
from seqboat.ops.blocks import Blocks, map_blocks, switch
from seqboat.ops.neighbours import Around, Stretch
from seqboat.ops.packing import RowInfo, compress, extract, pack, row_info
from seqboat.parallel import sequence
from seqboat.parallel.rules import SINGLE_DEVICE, Layout

Form = Literal["packed", "dense", "switched"]
Tree = Any

# Blocks projected at once for a windowed module, whose projection needs no halo: saves 5 to 8 % of a layer on a CPU.
PROJECTED_BLOCKS = 4
# Capacities of the switched form, evenly spaced: at most an eighth of all rows is computed in vain.
CAPACITIES = 8
# The largest tile of any attention kernel, in rows.
TILE = 128
# Methods that return rows (T, D); others return trees of T rows.
FINAL = ("__call__", "mix", "finish")


@dataclasses.dataclass(frozen=True)
class How:
    """The form, rows per block, blocks per iteration (`ops.blocks.Blocks`), and how sequences are split.
    Blocks and iterations are never larger than all rows, rounded up to tiles of 128.
    """

    form: Form = "packed"
    block_size: int = 128
    blocks_per_iteration: int = 1
    layout: Layout = SINGLE_DEVICE

    def __post_init__(self):
        for field in ("block_size", "blocks_per_iteration"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")

    def rows_per_block(self, rows: int) -> int:
        return min(self.block_size, -(-rows // TILE) * TILE)  # at most all rows, in whole tiles


def form_here(form: Form, streaming: bool) -> Form:
    """The form that is computed on this backend. Streams, which keep packed rows, have no switch."""
    if form == "packed" and jax.default_backend() != "cpu":
        form = "switched"
    return "packed" if form == "switched" and streaming else form


class Program(NamedTuple):
    """A module as a pure function: `apply(params, slot, method, x, *args)` returns the method's result for rows x and
    its taps, {name: rows}. `slot` (T,) numbers the rows; RNG keys are folded with the first."""

    module: nn.Module
    params: Tree
    apply: Callable

    @property
    def windowed(self) -> bool:
        return isinstance(self.module, WindowedModule)

    def frozen(self) -> "Program":
        """The program without gradient into its parameters."""
        return self._replace(params=jax.lax.stop_gradient(self.params))

    def halo(self, length: int, reach: int) -> tuple[int, int]:
        """How many rows before and after it a row may see, multiplied by `reach`."""
        left, right = self.module.halo(length) if self.windowed else (0, 0)  # type: ignore[attr-defined]
        return reach * left, reach * right


class Result(NamedTuple):
    """`y` and `taps` of every element (B S, ...). For a windowed module also `shown`, what its rows exposed to others,
    with their `position`, and `place` (B, S), the index of every element among these rows, or -1."""

    y: Array
    taps: dict[str, Array]
    shown: Tree = None
    position: Any = None
    place: Any = None


def run(
    program: Program, stretch: Stretch, how: How, memory: WorkingMemory | None, reach: int = 1
) -> tuple[Float[Array, "B L D"], dict[str, Array], WorkingMemory | None]:
    """The module's result and taps at the computed elements of the stretch, unspecified elsewhere, and the updated
    memory of a stream. In the packed form a row sees `reach` times the module's halo of computed rows."""
    around = _around(program, stretch, how, memory, reach)
    compute = {"dense": _dense, "packed": _packed, "switched": _switched}[form_here(how.form, memory is not None)]
    result = compute(program, around, how, reach)
    if memory is not None:
        memory = memory.remember(result.shown, result.position, result.place[:, around.own])
    back = lambda a: a.reshape(*around.stretch.computed.shape, *a.shape[1:])[:, around.own]
    return back(result.y), jax.tree.map(back, result.taps), memory


def _around(program: Program, stretch: Stretch, how: How, memory: WorkingMemory | None, reach: int) -> Around:
    if memory is not None:
        return streaming.around(memory, stretch)
    if program.windowed and how.layout.length:
        left, right = program.halo(stretch.m.shape[1] * how.layout.pieces, reach)
        return sequence.around(stretch, left, right, how.layout.length)
    return neighbours.alone(stretch)


def _dense(program: Program, around: Around, how: How, reach: int) -> Result:
    """All rows at once; only rows with `read` set are seen by others."""
    stretch, rows, start = around.stretch, around.rows(), jnp.zeros(1, jnp.int32)
    x, apply = stretch.m.reshape(-1, stretch.m.shape[-1]), functools.partial(program.apply, program.params, start)
    computed = stretch.computed
    place = jnp.where(computed, np.arange(computed.size, dtype=np.int32).reshape(computed.shape), -1)
    if not program.windowed:
        y, taps = apply("__call__", x)
        return Result(y, taps, None, rows.position, place)
    shown, taps = apply("context", x, rows)
    shown = around.recall(shown, place)
    y, more = apply("mix", x, shown, rows, rows)
    return Result(y, {**taps, **more}, shown, rows.position, place)


def _switched(program: Program, around: Around, how: How, reach: int) -> Result:
    """Packed rows in the smallest of CAPACITIES capacities that holds them: one decision, and within it no loop of
    unknown length. The gradient recomputes the chosen branch."""
    size = around.stretch.computed.size
    block = how.rows_per_block(size)
    rooms = sorted({-(-size * k // (CAPACITIES * block)) * block for k in range(1, CAPACITIES + 1)})

    def within(room, params, stretch):
        return _packed(program._replace(params=params), around._replace(stretch=stretch), how, reach, room)[:2]

    index = (around.stretch.computed.sum() > np.asarray(rooms[:-1], np.int32)).sum()
    return Result(*switch(index, [functools.partial(within, room) for room in rooms], program.params, around.stretch))


def _packed(program: Program, around: Around, how: How, reach: int, room: int | None = None) -> Result:
    """Blocks of packed rows: those that are filled, in loops, or all that `room` rows take."""
    stretch, static = around.stretch, room is not None
    left, right = program.halo(stretch.m.shape[1], reach)
    size = stretch.computed.size if room is None else room
    block_size = how.rows_per_block(size)
    blocks = -(-size // block_size)
    trip = -(-blocks // -(-blocks // how.blocks_per_iteration))
    # Single blocks are projected several at once; otherwise as many as an iteration has, so that no capacity is wasted.
    projected = trip if static or trip > 1 or not program.windowed else min(PROJECTED_BLOCKS, blocks)
    packing = pack(stretch.computed, projected * block_size, left=left, right=right, room=room)
    rows, x = compress((around.rows(), stretch.m.reshape(-1, stretch.m.shape[-1])), packing)
    place = packing.slot.reshape(stretch.computed.shape)
    wanted = None
    if around.shown is not None:  # remembered rows are seen, but need no result
        wanted = compress(stretch.computed.at[:, : around.own.start].set(False).reshape(-1), packing)
    cut = Blocks(packing.filled, block_size, left, right, trip, wanted, every=static)
    slot = jnp.arange(x.shape[0], dtype=jnp.int32)

    def project(method: str, *args: Tree) -> tuple[Tree, dict[str, Array]]:
        """A row-wise method; its blocks may be larger than those that are mixed."""
        fn = lambda params, own, _: program.apply(params, own[0], method, *own[1:])
        if static:  # margins are projected too, which is cheaper than cutting them off and padding the result
            return fn(program.params, (slot, *args), None)
        return map_blocks(fn, program.params, (slot, *args), None, cut.at_once(projected))

    if not program.windowed:
        return Result(*extract(project("__call__", x), packing))
    shown, taps = project("context", x, rows)
    shown = around.recall(shown, place)
    y, more = _mix(program, project, cut, (slot, x, rows), shown)
    y, taps = extract((y, {**taps, **more}), packing)
    return Result(y, taps, shown, rows.position, place)


def _mix(program: Program, project: Callable, cut: Blocks, own: tuple[Array, Array, RowInfo], shown: Tree):
    """`mix` of packed rows: block by block, which takes the least memory, or in three parts, the fewest operations."""
    slot, x, rows = own
    if rows.weight is None and program.module.mixes_packed(cut.every):  # credit weights keys
        q, asked = project("query", x, rows)
        mixed, read = program.apply(program.params, slot, "mix_packed", q, shown, rows, cut)
        y, finished = project("finish", x, mixed)
        return y, {**asked, **read, **finished}
    mix = lambda params, own, halo: program.apply(params, own[0], "mix", own[1], halo[0], own[2], halo[1])
    return map_blocks(mix, program.params, own, (shown, rows), cut)


def run_in_place(
    program: Program, m: Float[Array, "B L D"], active: Bool[Array, "B L"], memory: WorkingMemory | None
) -> tuple[Float[Array, "B L D"], dict[str, Array], WorkingMemory | None]:
    """`run` for short pieces of streams, without packing: new rows are first pushed to the memory, which has spare
    slots, and then read it. The memory is pushed to outside of conditions, whose arguments XLA would copy."""

    def where_needed(method, *args):
        streams = np.arange(len(m), dtype=np.int32)[:, None]
        one = lambda slot, *args: program.apply(program.params, slot, method, *args)
        each = functools.partial(jax.vmap(one), streams)
        nothing = lambda *args: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(each, *args))
        return jax.lax.cond(active.any(), each, nothing, *args)

    if memory is None:
        y, taps = where_needed("__call__", m)
    else:
        rows, _, position = streaming.in_place(memory, active)
        once = program.module.projects_once()  # type: ignore[attr-defined]
        exposed, taps = where_needed("project" if once else "context", m, rows)
        shown, *own = exposed if once else (exposed,)
        memory = memory.push(shown, position, active)
        y, more = where_needed("mix", m, memory.rows, rows, streaming.in_place(memory, active)[1], *own)
        taps |= more
    hide = lambda leaf: jnp.where(active.reshape(*active.shape, *[1] * (leaf.ndim - 2)), leaf, 0)
    return y, jax.tree.map(hide, taps), memory


def functional(module: nn.Module, keys: dict[str, Array], train: bool, tapping: bool) -> Program:
    """The module as a pure function. `keys` has a key for every RNG stream that it may draw from."""
    unbound = module.clone(parent=None)
    kinds = {name: jax.random.key_impl(key) for name, key in keys.items()}
    given = {name: module.variables.get(name, {}) for name in ("params", "edits")}
    params = {**given, "keys": jax.tree.map(jax.random.key_data, keys)}

    def key(name, data, method, slot):
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl=kinds[name]), slot[0])
        # Dropout keys are folded with submodule names, so they already differ between methods.
        return key if name == "dropout" else jax.random.fold_in(key, zlib.crc32(method.encode()))

    def apply(params, slot, method, *args):
        rngs = {name: key(name, data, method, slot) for name, data in params["keys"].items()}
        options, mutable = modes(unbound, method, len(args), train), ["terms", *(["taps"] if tapping else [])]
        variables = {name: params[name] for name in given}
        try:
            result, sown = unbound.apply(variables, *args, method=method, rngs=rngs, mutable=mutable, **options)
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                f"{describe_module(module)} draws from a missing RNG; there are {sorted(rngs)}, and "
                f'"dropout" only in training: {error}'
            ) from error
        if "terms" in sown:
            raise ValueError(f"{describe_module(module)} states a term of the loss; a module that is activated cannot")
        return _checked(unbound, method, args[0], result), dict(sown.get("taps", {}))

    return Program(unbound, params, apply)


def create(module: nn.Module, m: Float[Array, "B L D"], active: Bool[Array, "B L"], most: int, train: bool) -> None:
    """Create the module's parameters, from up to `most` rows, or one row of zeros without rows. Raises ValueError for a
    module with other variables."""
    if not m.size:
        m, active = jnp.zeros((1, 1, m.shape[-1]), m.dtype), jnp.zeros((1, 1), bool)
    count = min(m.shape[0] * m.shape[1], most)
    rows: RowInfo = jax.tree.map(lambda leaf: leaf[:count], row_info(active))
    x = m.reshape(-1, m.shape[-1])[:count]

    def call(method, *args):
        options = modes(module, method, len(args), train)
        return _checked(module, method, x, getattr(module, method)(*args, **options))

    if isinstance(module, WindowedModule):
        call("mix", x, call("context", x, rows), rows, rows)
    else:
        call("__call__", x)
    other = set(module.variables) - {"params", "taps"}
    if other:
        raise ValueError(f"a sparsely activated module may hold parameters only; {module.name} has {sorted(other)}")


def _checked(module: nn.Module, method: str, x: Array, result: Any) -> Any:
    """A method's result for the rows x (T, D); cast to their dtype if it is the module's final result."""
    rows, width = x.shape[0], x.shape[1] if method in FINAL else None
    check_rows(module, method, result, rows, width)
    return result if width is None else result.astype(x.dtype)
