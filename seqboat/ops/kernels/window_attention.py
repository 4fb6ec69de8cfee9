"""Exact sliding-window attention over packed rows as Pallas kernels, forward and backward.

    o_i = sum_j phi(s_i)_j v_j,   s_ij = scale q_i . k_j + bias_ij,   over the keys that row i sees

as defined by `seqboat.ops.window_attention.attend`. The values of a gated attention unit are 8 to 10 times as wide as
its keys, so scores are not recomputed for each tile of values, as in flash attention: the weights of the pairs of tiles
that can meet, a band of the matrix of weights, are stored in the dtype of v, and most kernels are plain products of
tiles (`attention_tiles`).

    forward     log_totals (softmax), weights, values
    backward    weights from the kept log_totals, score_gradient, query_gradient, key_gradient, value_gradient

None accumulates into another's result, so they are deterministic. A visible pair costs 5 Z + 3 E multiply-adds and 3
exponentials with softmax. A band has T (left + tile + right) numbers, without a window size the square of a sequence,
and exists within a pass only: between forward and backward o and log_totals are kept.

The grid covers all tiles, but a tile meets only those that its first and last row can reach within their sequences, and
a tile past the last filled row meets none and writes zeros: the cost scales with `count`. Pairs of tiles that do not
meet are never written and never read. Around the kernels margins are removed, widths padded to powers of two, and the
result padded again: copies of O(T (Z + E)). On a TPU the bands are also copied by tiles of keys.

The gradient of a bias table is computed outside the kernels: dS is summed by one scatter, as in the reference. On a GPU
that scatter uses atomics: it is the only nondeterministic operation, unless XLA is run with
--xla_gpu_deterministic_ops.

Float32 products have the platform's default precision, as in the reference (TF32 with Triton).

Tested in interpret mode and, by `launch/accelerator.sh`, on an H200 with jax 0.11.2; for TPUs only lowered. (Both
compilers accept the result ahead of time: Triton 3.9 for compute capabilities 8.0 and 9.0, without spilled registers,
libtpu 0.0.51 for TPU v5e.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Kernel(NamedTuple):
    """A body of `attention_tiles` and how many of its steps Triton keeps in flight with 2-byte numbers."""

    body: Callable
    stages: int


KERNELS = {
    "log_totals": Kernel(tiles.log_totals, 2),
    "weights": Kernel(tiles.weights, 1),
    "values": Kernel(tiles.product, 3),
    "score_gradient": Kernel(tiles.score_gradient, 3),
    "query_gradient": Kernel(tiles.product, 3),
    "key_gradient": Kernel(tiles.transposed_product, 3),
    "value_gradient": Kernel(tiles.transposed_product, 3),
}
# The part of a TPU core's VMEM, of at least 16 MiB, available to a program's windows.
WINDOW_BYTES = 14 * 2**20
# Segments of unfilled rows, and of unreadable keys.
UNFILLED, UNREADABLE_SEGMENT = 2**31 - 1, -1


class TileMetadata(NamedTuple):
    """Metadata of n tiles of rows: `query` (n, tile, 4) and `key` (n, 4, tile) hold segment, rank, position and
    padding; `met_by_query` (5, n) and `met_by_key` (3, n) the first tile that a tile meets, the one past the last, and
    the start of the window of tiles that it could meet; by query also the segment of all of its queries and that of all
    of its keys, if they have the same and are readable."""

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
    if plan.has_table != (table is not None):
        raise ValueError(f"position {plan.window.position!r} {'needs a' if plan.has_table else 'has no'} table")
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
        # What `score_gradient` holds: values, their cotangents, weights and the gradient of the scores,
        # double-buffered; all rows are padded to lanes of 128.
        lanes = lambda width: pl.cdiv(width, 128) * 128
        n, width = inner // plan.tile, lanes(v.shape[1]) * v.dtype.itemsize
        pairs = plan.slots(n) * lanes(plan.tile) * (v.dtype.itemsize + k.dtype.itemsize)
        held = 2 * plan.tile * ((plan.reach(n) + 1) * width + pairs)
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
    sole = [_sole_segment(x.reshape(-1, plan.tile), mixed) for x, mixed in ((segment, -2), (readable, -3))]
    return TileMetadata(
        tiled(segment, rank, position, blank),
        tiled(readable, rank, position, blank).swapaxes(1, 2),
        jnp.concatenate([_met(plan, segment, count, plan.left, plan.right), jnp.stack(sole)]),
        _met(plan, segment, count, plan.right, plan.left),
    )


def _sole_segment(segment: Int[Array, "n tile"], mixed: int) -> Int[Array, "n"]:
    """The segment of the rows of each tile; `mixed` for a tile with several."""
    return jnp.where(segment.min(axis=1) == segment.max(axis=1), segment[:, 0], mixed)


def _met(
    plan: KernelConfig, segment: Int[Array, "S"], count: Int[Array, ""], before: int, after: int
) -> Int[Array, "3 n"]:
    """The tiles that each tile meets, for rows that see `before` and `after` rows within their sequence."""
    n = segment.shape[0] // plan.tile
    tile = jnp.arange(n, dtype=jnp.int32)
    first_row = tile * plan.tile
    last_row = jnp.minimum(first_row + plan.tile, count.astype(jnp.int32)) - 1
    # Unrolled: the host of a GPU would read the condition of a loop.
    search = functools.partial(jnp.searchsorted, segment, method="scan_unrolled")
    begin = search(segment[first_row], side="left").astype(jnp.int32)
    end = search(segment[last_row], side="right").astype(jnp.int32)
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


def _full(x) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i, e: (0,) * len(x.shape))


def _call(plan: KernelConfig, name: str, met, inputs: list, outputs: list, programs: int = 1) -> tuple:
    """Run a kernel with n x `programs` programs; inputs are (array, spec), outputs (shape, spec)."""
    kernel = KERNELS[name]
    arrays, specs = (list(x) for x in zip(*inputs, strict=True))
    shapes, out_specs = (list(x) for x in zip(*outputs, strict=True))
    common: dict[str, Any] = {"out_shape": shapes, "interpret": plan.backend == "interpret", "name": name}
    grid = (met.shape[1], programs)

    def body(*refs):
        kernel.body(plan, *refs)

    body.__name__ = name  # shown by profilers
    if plan.windowed:
        run = pl.pallas_call(
            body,
            grid_spec=tpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_specs),
            compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            **common,
        )
    else:
        # One stage less for 4-byte numbers: at most 96 KiB of shared memory at Z 128.
        stages = kernel.stages if arrays[0].dtype.itemsize < 4 else max(kernel.stages - 1, 1)
        run = pl.pallas_call(
            body,
            grid=grid,
            in_specs=[_full(met), *specs],
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
    log_total = jnp.zeros((*q.shape[:2], 1), jnp.float32)
    if plan.window.function == "softmax":
        inputs = [(q, _own(q)), (known.query, _own(known.query)), *_keys(plan, table, k, known)]
        (log_total,) = _call(plan, "log_totals", known.met_by_query, inputs, [_out(log_total.shape, jnp.float32)])
    (band,) = _weights(plan, table, q, k, known, log_total, [v.dtype])
    o = _product(plan, "values", known.met_by_query, band, v, v.dtype)
    return o, (table, q, k, v, known, o, log_total)


def _backward(plan: KernelConfig, residuals, d_o: Array):
    table, q, k, v, known, o, log_total = residuals
    softmax = plan.window.function == "softmax"
    # Otherwise XLA would keep the band of the forward pass for this one.
    log_total, d_o = jax.lax.optimization_barrier((log_total, d_o))
    band, *slope = _weights(plan, table, q, k, known, log_total, [v.dtype] * (1 if softmax else 2))
    credit = jnp.zeros_like(log_total)
    if softmax:
        slope, credit = [band], (d_o.astype(jnp.float32) * o.astype(jnp.float32)).sum(axis=2, keepdims=True)
    own = [(x, _own(x)) for x in (*slope, d_o, credit)]
    outputs = [_out(band.shape, k.dtype)]
    inputs = [*own, (v, _around(plan, v))]
    (d_scores,) = _call(plan, "score_gradient", known.met_by_query, inputs, outputs, _pair_programs(plan, band))
    d_q = _product(plan, "query_gradient", known.met_by_query, d_scores, k, q.dtype)
    d_k = _product(plan, "key_gradient", known.met_by_key, d_scores, q, k.dtype)
    d_v = _product(plan, "value_gradient", known.met_by_key, band, d_o, v.dtype)
    d_table = None if table is None else _table_gradient(plan, table, known, d_scores)
    return d_table, d_q, d_k, d_v, None


def _keys(plan: KernelConfig, table, k: Array, known: TileMetadata) -> list:
    """What scores need of the tiles that are met."""
    inputs = [(x, _around(plan, x)) for x in (k, known.key)]
    return inputs if table is None else [*inputs, (table, _full(table))]


def _weights(plan: KernelConfig, table, q: Array, k: Array, known: TileMetadata, log_total, dtypes: list) -> tuple:
    """The band of weights and, for a second dtype, that of their derivatives by the scores."""
    n = q.shape[0]
    bands = [_out((n, plan.slots(n), plan.tile, plan.tile), dtype) for dtype in dtypes]
    inputs = [*((x, _own(x)) for x in (q, known.query, log_total)), *_keys(plan, table, k, known)]
    return _call(plan, "weights", known.met_by_query, inputs, bands, _pair_programs(plan, bands[0][0]))


def _pair_programs(plan: KernelConfig, band) -> int:
    """On a GPU a program for each pair; on a TPU one for all pairs of a tile, since a program costs as much as one."""
    return 1 if plan.windowed else band.shape[1]


def _product(plan: KernelConfig, name: str, met, band: Array, x: Array, dtype) -> Array:
    """The band, or its transpose, times x, over tiles of columns."""
    split = min(plan.value_tile, x.shape[2])
    spec = _own(band)
    if KERNELS[name].body is tiles.transposed_product:
        band, spec = (_by_key(plan, band), spec) if plan.windowed else (band, _full(band))
    inputs = [(band, spec), (x, _around(plan, x, split))]
    return _call(plan, name, met, inputs, [_out(x.shape, dtype, split)], x.shape[2] // split)[0]


def _by_key(plan: KernelConfig, band: Array) -> Array:
    """The band by tiles of keys: slot s of tile j is slot s of tile j - s + before. A TPU's program then holds its own
    pairs as one piece."""
    n, slots = band.shape[:2]
    own, slot = jnp.ogrid[:n, :slots]
    return band[jnp.clip(own - slot + plan.before(n), 0, n - 1), slot]


def _table_gradient(plan: KernelConfig, table: Array, known: TileMetadata, d_scores: Array) -> Array:
    """The sum of dS over the pairs of each table entry."""
    n, slots = d_scores.shape[:2]
    row, slot = jnp.ogrid[:n, :slots]
    met = row + slot - plan.before(n)
    first, end = known.met_by_query[:2, :, None]
    written = ((met >= first) & (met < end))[:, :, None, None]
    query = tuple(known.query[:, None, :, c, None] for c in range(3))
    key = tuple(known.key[:, c][jnp.clip(met, 0, n - 1)][:, :, None] for c in range(3))
    # Outside the table for what is not written: a GPU adds by atomics, and zeros for one entry would queue for it.
    entry = jnp.where(written, tiles.table_entry(plan.window, table.shape[0], query, key), table.shape[0])
    total = jnp.zeros(table.shape, jnp.float32)
    total = total.at[entry.reshape(-1)].add(d_scores.astype(jnp.float32).reshape(-1), mode="drop")
    return total.astype(table.dtype)


_attend.defvjp(_forward, _backward)
