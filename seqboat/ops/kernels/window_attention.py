"""Exact sliding-window attention over packed rows as Pallas kernels, forward and backward.

    o_i = sum_j phi(s_i)_j v_j,   s_ij = scale q_i . k_j + bias_ij,   over the keys that row i sees

as defined by `seqboat.ops.window_attention.attend`, without a matrix of scores: a program owns one tile of rows, loops
over the tiles that it meets, and recomputes the scores in the backward pass from a saved log-sum-exp. Four kernels
(`attention_tiles`): o over queries and tiles of values, dq over queries, dk over keys, dv over keys and tiles of
values. None accumulates into another's result, so they are deterministic.

The grid covers all tiles, but a tile meets only those that its first and last row can reach within their sequences, and
a tile past the last filled row meets none and writes zeros: the cost scales with `count`. Around the kernels margins
are removed, widths padded to powers of two, and the result padded again: copies of O(T (Z + E)).

The gradient of a bias table is computed outside the kernels: dS (T (left + tile + right) float32, and as many int32
indices) is written out and summed by one scatter, as in the reference. On a GPU that scatter uses atomics: it is the
only nondeterministic operation, unless XLA is run with --xla_gpu_deterministic_ops.

Float32 products have the platform's default precision, as in the reference (TF32 with Triton).

Tested in interpret mode and lowered; never run on the hardware. (Both compilers accept the result ahead of time: Triton
3.9 for compute capabilities 8.0 and 9.0, libtpu 0.0.42 for TPU v4, v5e, v5p and v6e.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton
from jaxtyping import Array, Float, Int

from seqboat.ops.kernels import attention_tiles as tiles
from seqboat.ops.kernels.attention_tiles import Backend, KernelConfig
from seqboat.ops.packing import RowInfo
from seqboat.ops.window import Window

# Rows and values per tile. Triton: an accumulator of 64 x 128 float32 is 64 registers per thread with four warps.
TILES: dict[str, tuple[int, int]] = {"triton": (64, 128), "tpu": (128, 512), "interpret": (16, 16)}
# The smallest side of a matrix product in Triton.
SMALLEST = 16
WARPS = 4
# The part of a TPU core's VMEM, of at least 16 MiB, available to a program's windows.
WINDOW_BYTES = 14 * 2**20
# Segments of unfilled rows, and of unreadable keys.
UNFILLED, UNREADABLE_SEGMENT = 2**31 - 1, -1


class TileMetadata(NamedTuple):
    """Metadata of n tiles of rows: `query` (n, tile, 4) and `key` (n, 4, tile) hold segment, rank, position and
    padding; `met_by_query` and `met_by_key` (3, n) the first tile that a tile meets, the one past the last, and the
    start of the window of tiles that it could meet."""

    query: Array
    key: Array
    met_by_query: Array
    met_by_key: Array


def unsupported_reason(window: Window, backend: Backend) -> str | None:
    """Why these kernels do not support this window on this backend; None if they do."""
    if window.position == "slot" and window.size is None:
        return "position 'slot' needs a window with a size"
    if backend == "tpu" and window.position in ("relative", "slot", "t5"):
        return f"position {window.position!r} looks up a table, which TPU kernels cannot; use 'none' or 'rotary'"
    return None


def attend_packed(
    window: Window,
    table: Float[Array, "P"] | None,
    q: Float[Array, "T Z"],
    k: Float[Array, "T Z"],
    v: Float[Array, "T E"],
    rows: RowInfo,
    count: Int[Array, ""],
    *,
    left: int,
    right: int,
    backend: Backend,
    sizes: tuple[int, int] | None = None,
) -> Float[Array, "T E"]:
    """Row i: `attend` over the rows i - left .. i + right; 0 for rows that are not filled.

    T is a margin of `left` rows, a whole number of tiles, and a margin of `right` rows (`packing.pack`). The first
    `count` rows after the left margin are filled, sorted by segment, then position; the others may hold any finite
    numbers. q and k come from `window.apply_rotary`. `sizes` overrides the rows and values per tile of `TILES`, both
    powers of two of at least 16.

    Supports all functions and position kinds, causal or not, with or without a window size; float32 or bfloat16, any Z
    and E. On TPUs only the positions "none" and "rotary", and windows that fit in VMEM. No dropout, no `rows.weight`.
    """
    tile, value_tile = sizes or TILES[backend]
    value_tile = min(value_tile, max(SMALLEST, pl.next_power_of_2(v.shape[1])))
    plan = KernelConfig(window, left, right, tile, value_tile, backend)
    _check(plan, table, q, k, v, rows)
    # Without a window size the scale depends on the row, so the caller applies it, as in the reference.
    q = (q.astype(jnp.float32) * window.scale(rows, q.shape[1])).astype(q.dtype)
    key_width = max(SMALLEST, pl.next_power_of_2(q.shape[1]))
    cut = lambda x, width: _cut(plan, x, width)
    o = _attend(
        plan,
        table,
        cut(q, key_width),
        cut(k, key_width),
        cut(v, pl.cdiv(v.shape[1], value_tile) * value_tile),
        tile_metadata(plan, rows, count),
    )
    o = o.reshape(-1, o.shape[2])[:, : v.shape[1]]
    return jnp.pad(o, ((left, right), (0, 0)))


def _check(plan: KernelConfig, table, q: Array, k: Array, v: Array, rows: RowInfo) -> None:
    """Raise ValueError for invalid arguments before anything is compiled."""
    reason = unsupported_reason(plan.window, plan.backend)
    if reason:
        raise ValueError(reason)
    has_table = plan.window.position not in ("none", "rotary")
    if has_table != (table is not None):
        raise ValueError(f"position {plan.window.position!r} {'needs a' if has_table else 'has no'} table")
    if rows.weight is not None:
        raise ValueError("keys with weights are not supported: use attend")
    for size in (plan.tile, plan.value_tile):
        if size < SMALLEST or size & (size - 1):
            raise ValueError(f"tile sizes must be powers of two of at least {SMALLEST}, not {size}")
    total = q.shape[0]
    if k.shape != q.shape or v.shape[0] != total or any(leaf.shape != (total,) for leaf in rows[:5]):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} and rows {rows.rank.shape} do not match")
    if k.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} and k is {k.dtype}: they must have the same dtype")
    inner = total - plan.left - plan.right
    if inner <= 0 or inner % plan.tile:
        raise ValueError(
            f"{total} rows are not a whole number of tiles of {plan.tile} between {plan.left} and {plan.right}"
        )
    if plan.windowed:
        # Queries, their cotangents, metadata and saved values, double-buffered;
        # all rows are padded to lanes of 128.
        lanes = lambda width: pl.cdiv(width, 128) * 128
        row = lanes(q.shape[1]) * q.dtype.itemsize + lanes(v.shape[1]) * v.dtype.itemsize + 2 * lanes(4) * 4
        held = 2 * plan.reach(inner // plan.tile) * plan.tile * row
        if held > WINDOW_BYTES:
            raise ValueError(f"a window of {held >> 20} MiB does not fit in {WINDOW_BYTES >> 20} MiB of a TPU core")


def _cut(plan: KernelConfig, x: Float[Array, "T W"], width: int) -> Float[Array, "n tile width"]:
    """The rows between the margins in tiles, with zero-padded width."""
    x = x[plan.left : x.shape[0] - plan.right]
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1]))).reshape(-1, plan.tile, width)


def tile_metadata(plan: KernelConfig, rows: RowInfo, count: Int[Array, ""]) -> TileMetadata:
    segment, position, rank, _, active = (leaf[plan.left : leaf.shape[0] - plan.right] for leaf in rows[:5])
    slot = jnp.arange(segment.shape[0], dtype=jnp.int32)
    filled = slot < count
    blank = jnp.zeros_like(slot)
    rank, position = (jnp.where(filled, x, 0).astype(jnp.int32) for x in (rank, position))
    segment = jnp.where(filled, segment, UNFILLED).astype(jnp.int32)
    readable = jnp.where(filled & active, segment, UNREADABLE_SEGMENT)
    tiled = lambda *x: jnp.stack(x, axis=-1).reshape(-1, plan.tile, len(x))
    return TileMetadata(
        tiled(segment, rank, position, blank),
        tiled(readable, rank, position, blank).swapaxes(1, 2),
        _met(plan, segment, count, plan.left, plan.right),
        _met(plan, segment, count, plan.right, plan.left),
    )


def _met(
    plan: KernelConfig, segment: Int[Array, "S"], count: Int[Array, ""], before: int, after: int
) -> Int[Array, "3 n"]:
    """The tiles that each tile meets, for rows that see `before` and `after` rows within their sequence."""
    n = segment.shape[0] // plan.tile
    tile = jnp.arange(n, dtype=jnp.int32)
    first_row = tile * plan.tile
    last_row = jnp.minimum(first_row + plan.tile, count.astype(jnp.int32)) - 1
    begin = jnp.searchsorted(segment, segment[first_row], side="left").astype(jnp.int32)
    end = jnp.searchsorted(segment, segment[last_row], side="right").astype(jnp.int32)
    first = jnp.maximum(first_row - before, begin) // plan.tile
    past = jnp.minimum(last_row + after, end - 1) // plan.tile + 1
    filled = first_row < count
    # Tiles past the last filled one reuse its window, which is then not fetched again.
    last = jnp.maximum(filled.sum(dtype=jnp.int32) - 1, 0)
    window = jnp.clip(jnp.minimum(tile, last) - -(-before // plan.tile), 0, n - plan.reach(n))
    return jnp.stack([jnp.where(filled, first, 0), jnp.where(filled, past, 0), window])


def _own(x, split: int = 0) -> pl.BlockSpec:
    """One tile per program of an array (n, ..., width), with its width cut into pieces of `split`."""
    middle = x.shape[1:-1]
    index = lambda i, e, *_: (i, *(0 for _ in middle), e if split else 0)
    return pl.BlockSpec((None, *middle, split or x.shape[-1]), index)


def _around(plan: KernelConfig, x, split: int = 0) -> pl.BlockSpec:
    """The tiles of an array (n, rows, width) that a program may meet, with the width cut into pieces of `split`."""
    n, rows, width = x.shape
    # A single piece has index 0: TPUs need proof that other offsets are multiples of 128.
    split = split if split < width else 0
    width = split or width
    if plan.windowed:
        shape = tuple(pl.Element(size) for size in (plan.reach(n), rows, width))
        return pl.BlockSpec(shape, lambda i, e, met: (met[2, i], 0, e * width if split else 0))
    return pl.BlockSpec((n, rows, width), lambda i, e: (0, 0, e if split else 0))


def _call(plan: KernelConfig, kernel, met, inputs: list, table, outputs: list, value_tiles: int = 1) -> tuple:
    """Run a kernel over n x `value_tiles` programs; inputs are (array, spec), outputs (shape, spec)."""
    n = met.shape[1]
    if table is not None:
        inputs = [*inputs, (table, pl.BlockSpec(table.shape, lambda i, e: (0,)))]
    arrays, specs = (list(x) for x in zip(*inputs, strict=True))
    shapes, out_specs = (list(x) for x in zip(*outputs, strict=True))
    common = {"out_shape": shapes, "interpret": plan.backend == "interpret", "name": kernel.__name__}
    body = functools.partial(kernel, plan)
    grid = (n, value_tiles)
    if plan.windowed:
        run = pl.pallas_call(
            body,
            grid_spec=tpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_specs),
            compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            **common,
        )
    else:
        # Two tiles in flight for 2-byte numbers, one for 4-byte ones: at Z 128 Triton then uses 97 and 128 KiB of
        # shared memory, of the 163 KiB of compute capability 8.0.
        stages = 2 if arrays[0].dtype.itemsize < 4 else 1
        run = pl.pallas_call(
            body,
            grid=grid,
            in_specs=[pl.BlockSpec(met.shape, lambda i, e: (0, 0)), *specs],
            out_specs=out_specs,
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=stages),
            **common,
        )
    return tuple(run(met, *arrays))


def _out(shape: tuple, dtype, split: int = 0) -> tuple:
    out = jax.ShapeDtypeStruct(shape, dtype)
    return out, _own(out, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: KernelConfig, table, q: Array, k: Array, v: Array, known: TileMetadata) -> Array:
    return _forward(plan, table, q, k, v, known)[0]


def _forward(plan: KernelConfig, table, q: Array, k: Array, v: Array, known: TileMetadata):
    part = plan.value_tile
    inputs = [(q, _own(q)), (known.query, _own(known.query))]
    inputs += [(k, _around(plan, k)), (known.key, _around(plan, known.key)), (v, _around(plan, v, part))]
    outputs = [_out(v.shape, v.dtype, part), _out((*v.shape[:2], 1), jnp.float32)]
    o, log_total = _call(plan, tiles.read, known.met_by_query, inputs, table, outputs, v.shape[2] // part)
    return o, (table, q, k, v, known, o, log_total)


def _backward(plan: KernelConfig, residuals, d_o: Array):
    table, q, k, v, known, o, log_total = residuals
    credit = (d_o.astype(jnp.float32) * o.astype(jnp.float32)).sum(axis=2, keepdims=True)
    saved, part = jnp.concatenate([log_total, credit], axis=2), plan.value_tile
    around = lambda x, split=0: (x, _around(plan, x, split))

    own = [(x, _own(x)) for x in (q, known.query, saved, d_o)]
    outputs = [_out(q.shape, q.dtype)]
    if table is not None:
        outputs.append(_out((q.shape[0], plan.reach(q.shape[0]), plan.tile, plan.tile), jnp.float32))
    met = [around(k), around(known.key), around(v)]
    d_q, *d_scores = _call(plan, tiles.query_gradient, known.met_by_query, own + met, table, outputs)

    own, met = [(x, _own(x)) for x in (k, known.key)], [around(x) for x in (q, known.query, saved)]
    inputs = [*own, (v, _own(v)), *met, around(d_o)]
    (d_k,) = _call(plan, tiles.key_gradient, known.met_by_key, inputs, table, [_out(k.shape, k.dtype)])
    inputs, outputs = [*own, *met, around(d_o, part)], [_out(v.shape, v.dtype, part)]
    (d_v,) = _call(plan, tiles.value_gradient, known.met_by_key, inputs, table, outputs, v.shape[2] // part)
    d_table = _table_gradient(plan, table, known, *d_scores) if d_scores else None
    return d_table, d_q, d_k, d_v, None


def _table_gradient(plan: KernelConfig, table: Array, known: TileMetadata, d_scores: Array) -> Array:
    """The sum of dS over the pairs of each table entry."""
    met = known.met_by_query[2][:, None] + jnp.arange(d_scores.shape[1])[None]
    query = tuple(known.query[:, None, :, c, None] for c in range(3))
    key = tuple(known.key[:, c][met][:, :, None] for c in range(3))
    entry = tiles.table_entry(plan.window, table.shape[0], query, key)
    total = jnp.zeros(table.shape, jnp.float32).at[entry.reshape(-1)].add(d_scores.reshape(-1))
    return total.astype(table.dtype)


_attend.defvjp(_forward, _backward)
