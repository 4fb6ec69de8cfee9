"""The kernels against `attend` over all rows: interpreted on a CPU, and lowered for the hardware."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, F32, assert_close, grid, normal, value_and_vjp
from jax.experimental.pallas import tpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from seqboat.ops.kernels import window_attention
from seqboat.ops.kernels.window_attention import KernelConfig, attend_packed, tile_metadata, unsupported_reason
from seqboat.ops.packing import RowInfo, compress, extract, pack, row_info
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend, kernel_notice

# 48 rows are three tiles of 16, and 20 values two tiles of 16.
BATCH, LENGTH, KEY_SIZE, VALUE_SIZE = 2, 24, 8, 20
ROWS, SIZES = BATCH * LENGTH, (16, 16)
TABLES = {"relative": 2 * 13 - 1, "t5": 32}
# The gradient of the score of a sole key is 0, and so is the weight of a low score under Laplace: nearly, in `attend`.
FLOOR = 0.1


def activations() -> dict[str, np.ndarray]:
    some = np.random.default_rng(0).random((BATCH, LENGTH)) < 0.6
    one = np.zeros((BATCH, LENGTH), bool)
    one[1, 7] = True
    return {"none": np.zeros_like(some), "one": one, "some": some, "all": np.ones_like(some)}


def make_table(window):
    size = 6 * (window.size or 0) - 1 if window.position == "slot" else TABLES.get(window.position)
    return None if size is None else normal(4, size) / 2


def arguments(window, dtype=jnp.float32):
    q, k, v = normal(0, ROWS, KEY_SIZE), normal(1, ROWS, KEY_SIZE), normal(2, ROWS, VALUE_SIZE)
    return make_table(window), *(x.astype(dtype) for x in (q, k, v))


def poisoned(rows, filled, poison):
    """Rows whose empty slots claim to be readable rows of the first sequence."""
    lies = RowInfo(*(jnp.zeros_like(leaf) for leaf in rows[:4]), jnp.full_like(rows.active, True))
    return jax.tree.map(lambda lie, leaf: jnp.where(filled | (poison == 0), leaf, lie), lies, rows)


def kernel(window, backend, active, poison, table, q, k, v):
    """From rows to rows by way of packed ones, whose empty slots hold `poison`."""
    rows, (left, right) = row_info(active), window.halo(LENGTH)
    packing = pack(active, SIZES[0], left=left, right=right)
    q, k = window.apply_rotary(q, rows), window.apply_rotary(k, rows)
    rows, q, k, v = compress((rows, q, k, v), packing)
    filled = packing.source >= 0
    q, k, v = (jnp.where(filled[:, None], x, poison.astype(x.dtype)) for x in (q, k, v))
    rows = poisoned(rows, filled, poison)
    options = {"left": left, "right": right, "backend": backend, "sizes": SIZES}
    o = attend_packed(window, table, q, k, v, rows, packing.filled, **options)
    empty = jnp.abs(jnp.where(filled[:, None], 0, o)).sum()
    return extract(o, packing), empty


def reference(window, active, table, q, k, v):
    rows = row_info(active)
    o = attend(window, table, window.apply_rotary(q, rows), window.apply_rotary(k, rows), v, rows, rows)
    return jnp.where(rows.active[:, None], o, 0)


def agree(window, backend="interpret", dtype=jnp.float32, tolerance=F32):
    """Values and gradients of q, k, v and the table at every activation, with clean and with poisoned empty slots."""

    @jax.jit
    def both(cotangent, active, poison, *args):
        got, transpose, empty = jax.vjp(functools.partial(kernel, window, backend, active, poison), *args, has_aux=True)
        expected, transposed = jax.vjp(functools.partial(reference, window, active), *args)
        return (got, transpose(cotangent)), (expected, transposed(cotangent)), empty

    cotangent = normal(3, ROWS, VALUE_SIZE).astype(dtype)
    for name, active in activations().items():
        for poison in (0.0, 1e30):
            got, expected, empty = both(cotangent, active, jnp.float32(poison), *arguments(window, dtype))
            assert got[0].dtype == dtype
            assert empty == 0, name
            assert_close(got, expected, tolerance, FLOOR)


def name(window):
    return "-".join(map(str, (window.function, window.position, "causal" if window.causal else "both", window.size)))


# Windows within a tile, wider than a tile, and wider than a sequence: each function, position kind and direction.
WINDOWS = [
    Window(5, True, "softmax", "relative"),
    Window(40, False, "softmax", "slot"),
    Window(20, False, "laplace", "rotary"),
    Window(17, False, "relu2", "none"),
    Window(None, True, "relu2", "t5"),
]


@pytest.mark.parametrize("window", grid(WINDOWS, WINDOWS[0]), ids=name)
def test_equals_the_reference(window):
    agree(window)


HALF = [Window(17, False, "softmax", "none"), Window(5, True, "laplace", "relative")]


@pytest.mark.breadth  # test_equals_the_reference
@pytest.mark.parametrize("window", grid(HALF, HALF[0]), ids=name)
def test_half_precision(window):
    agree(window, dtype=jnp.bfloat16, tolerance=BF16)


TPU = [Window(5, True, "softmax", "rotary"), Window(20, False, "laplace", "none")]


@pytest.mark.breadth  # test_equals_the_reference computes with the same tiles, test_lowers_for_the_hardware lowers them
@pytest.mark.parametrize("window", TPU, ids=name)
def test_the_form_for_a_tpu_equals_the_reference(window):
    with tpu.force_tpu_interpret_mode():
        agree(window, "tpu")


@jax.jit
def band_of_weights(q, active):
    """The band of a softmax over the keys of three tiles back, and which of its pairs of tiles meet."""
    left, length = 40, active.shape[1]
    plan = KernelConfig(Window(left, True, "softmax", "none"), left, 0, 16, 16, "interpret")
    rows = jax.tree.map(lambda x: jnp.pad(x, (left, 0)), row_info(active))
    known = tile_metadata(plan, rows, jnp.int32(length - 20))
    q = q.reshape(-1, 16, q.shape[1])
    (band,) = window_attention._weights(plan, None, q, q, known, jnp.zeros((*q.shape[:2], 1)), [q.dtype])
    row, slot = jnp.ogrid[: band.shape[0], : band.shape[1]]
    met = row + slot - plan.before(len(q))
    return band, (met >= known.met_by_query[0, :, None]) & (met < known.met_by_query[1, :, None])


def test_pairs_of_tiles_that_do_not_meet_are_not_written():
    """So they are NaN when interpreted, and every comparison above also shows that none is read. Of those that meet,
    some are visible as a whole."""
    q = normal(0, 96, 16) / 4
    band, met = band_of_weights(q, jnp.ones((1, 96), bool))
    met = np.broadcast_to(np.asarray(met)[:, :, None, None], band.shape)
    assert band.shape == (6, 4, 16, 16)
    assert met.any()
    np.testing.assert_array_equal(np.isnan(band), ~met)
    row, key = np.ogrid[:96, :96]
    visible = (key <= row) & (row - key <= 40) & (row < 76)
    expected = np.where(visible, np.exp(np.asarray(q) @ np.asarray(q).T), 0).reshape(6, 16, 6, 16).swapaxes(1, 2)
    for i, slot in zip(*np.nonzero(met[:, :, 0, 0]), strict=True):
        assert_close(band[i, slot], expected[i, i + slot - 3])


# test_equals_the_reference: keys out of reach; test_pairs_of_tiles_that_do_not_meet_are_not_written: rows.
@pytest.mark.parametrize(("size", "left", "right"), grid({"narrower": (9, 4, 2), "wider": (3, 12, 7)}))
def test_filled_rows_that_may_not_be_read_and_keys_out_of_reach(size, left, right):
    """Packed rows beside the reference on the same rows: a reach that is not that of the window, and some mute rows."""
    window, count = Window(size, False, "softmax", "slot"), 41
    readable = np.random.default_rng(1).random((BATCH, LENGTH)) < 0.7
    total = left + ROWS + right
    margins = lambda x: jnp.pad(x, [(left, right), *[(0, 0)] * (x.ndim - 1)])
    rows = jax.tree.map(margins, row_info(jnp.asarray(readable)))
    table, *qkv = arguments(window)
    q, k, v = (margins(x) for x in qkv)
    options = {"left": left, "right": right, "backend": "interpret", "sizes": SIZES}

    slot = jnp.arange(total)
    filled = (slot >= left) & (slot < left + count)

    def narrow(table, q, k, v):
        def row(i, q, query):
            reach = filled & (slot >= i - left) & (slot <= i + right)
            key = rows._replace(active=rows.active & reach)
            query = jax.tree.map(lambda leaf: leaf[None], query)
            return attend(window, table, q[None], k, v, query, key)[0]

        return jnp.where(filled[:, None], jax.vmap(row)(slot, q, rows), 0)

    got = value_and_vjp(lambda *args: attend_packed(window, *args, rows, jnp.int32(count), **options))
    given = (normal(5, total, VALUE_SIZE), table, q, k, v)
    assert_close(got(*given), value_and_vjp(narrow)(*given))


@pytest.mark.breadth  # test_pairs_of_tiles_that_do_not_meet_are_not_written
def test_tiles_met_follow_the_filled_rows_and_the_sequences():
    """Of 64 tiles of 16 rows, in sequences of 256 and of 16 rows."""

    def met(length, count, left, right):
        plan = KernelConfig(Window(left, not right, "softmax", "none"), left, right, 16, 16, "interpret")
        rows = jax.tree.map(lambda x: jnp.pad(x, (left, right)), row_info(jnp.ones((1024 // length, length), bool)))
        known = jax.jit(tile_metadata, static_argnums=0)(plan, rows, jnp.int32(count))
        forth, back = (np.asarray(x[1] - x[0]) for x in (known.met_by_query, known.met_by_key))
        assert forth.sum() == back.sum()
        return forth

    assert not met(256, 0, 32, 32).any()
    assert met(256, 1, 32, 32).tolist() == [1] + [0] * 63
    assert met(256, 100, 32, 0).tolist() == [1, 2, 3, 3, 3, 3, 3] + [0] * 57
    assert met(256, 256, 17, 0).tolist() == [1, 2, *[3] * 14] + [0] * 48
    assert met(256, 1024, 32, 32).tolist() == [3, 4, *[5] * 12, 4, 3] * 4
    assert met(16, 1024, 256, 256).tolist() == [1] * 64


LM = (Window(1024, True, "softmax", "rotary"), 1, 8192, 128, 1024, jnp.bfloat16)
TEXT = (Window(128, False, "softmax", "rotary"), 4, 4096, 64, 256, jnp.float32)
# Widths that are not powers of two, and the error function.
SPEECH = (Window(128, False, "laplace", "none"), 1, 16000, 30, 60, jnp.float32)
LOOKED_UP = (Window(128, False, "softmax", "relative"), 4, 4096, 64, 256, jnp.float32)
SLOTS = (Window(128, False, "relu2", "slot"), 1, 16000, 30, 60, jnp.float32)


def trace(case, backend):
    """Values and gradients of a layer's attention, traced."""
    window, batch, length, key_size, value_size, dtype = case
    left, right = window.halo(length)
    total = left + batch * length + right
    shape = jax.ShapeDtypeStruct
    integers, table = shape((total,), jnp.int32), jax.eval_shape(lambda: make_table(window))
    rows = RowInfo(integers, integers, integers, integers, shape((total,), bool))

    def run(table, q, k, v, rows, count):
        options = {"left": left, "right": right, "backend": backend}
        out, transpose = jax.vjp(lambda *args: attend_packed(window, *args, rows, count, **options), table, q, k, v)
        return out, transpose(out)

    q, v = shape((total, key_size), dtype), shape((total, value_size), dtype)
    return jax.jit(run).trace(table, q, q, v, rows, shape((), jnp.int32))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "platform", "call", "case"),
    grid(
        [("triton", "cuda", "__gpu$xla.gpu.triton", case) for case in (LM, TEXT, SPEECH, LOOKED_UP, SLOTS)]
        + [("tpu", "tpu", "tpu_custom_call", case) for case in (LM, TEXT, SPEECH)],
        ("triton", "cuda", "__gpu$xla.gpu.triton", LM),
    ),
)
def test_lowers_for_the_hardware(backend, platform, call, case):
    """Three kernels forward and five backward; two and five where the function has no totals. No loop outside them,
    whose condition a GPU's host would read."""
    device = AbstractDevice("NVIDIA H100", 132, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("_",), abstract_device=device if platform == "cuda" else None)):
        text = trace(case, backend).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f"@{call}(") == (8 if case[0].function == "softmax" else 7)
    assert "stablehlo.while" not in text


def counted(jaxpr) -> np.ndarray:
    """Multiply-adds and exponentials of a kernel that meets one tile: a loop over tiles runs once."""
    total = np.zeros(2)
    for eqn in jaxpr.eqns:
        size = sum(out.aval.size for out in eqn.outvars if eqn.primitive.name in ("dot_general", "exp"))
        if eqn.primitive.name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            total[0] += size * math.prod(eqn.invars[0].aval.shape[axis] for axis in over)
        elif eqn.primitive.name == "exp":
            total[1] += size
        inner = [body for key, body in eqn.params.items() if key in ("jaxpr", "body_jaxpr", "call_jaxpr")]
        for body in inner:
            total += eqn.params.get("length", 1) * counted(getattr(body, "jaxpr", body))
        if "branches" in eqn.params:
            total += np.max([counted(branch.jaxpr) for branch in eqn.params["branches"]], axis=0)
    return total


def work(case, tile=64):
    """The multiply-adds and exponentials of every kernel for a pair of rows."""
    found = []
    for eqn in trace(case, "triton").jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            name, (_, programs) = eqn.params["jaxpr"].debug_info.func_name, eqn.params["grid_mapping"].grid
            # Programs of a pair of tiles: one for pairs, one for each tile of columns for sums.
            programs = 1 if name in ("weights", "score_gradient") else programs
            found.append((name, *(programs * counted(eqn.params["jaxpr"]) / tile**2)))
    return found


@pytest.mark.parametrize(
    ("function", "exponentials"), grid([("softmax", 3), ("relu2", 0), ("laplace", 3)], ("softmax", 3))
)
def test_each_needed_product_is_done_once(function, exponentials):
    """5 Z + 3 E multiply-adds per pair of rows, of which Z are for the totals of softmax."""
    window = Window(1024, True, function, "none")
    kernels = work((window, *LM[1:]))
    keys, values = {"log_totals", "weights", "query_gradient", "key_gradient"}, LM[4]
    softmax = function == "softmax"
    assert len(kernels) == (8 if softmax else 7)
    for name, products, _ in kernels:
        assert products == (LM[3] if name in keys else values), name
    assert sum(products for _, products, _ in kernels) == (3712 if softmax else 3584)
    assert sum(count for _, _, count in kernels) == pytest.approx(exponentials, rel=0.05)


NONE, SLOT = Window(5, True, "softmax", "none"), Window(5, True, "softmax", "slot")
REFUSED = {
    "margins": ({"left": 3}, "whole number of tiles"),
    "rows": ({"rows": 52}, "do not match"),
    "key dtype": ({"k": jnp.zeros((53, KEY_SIZE), jnp.bfloat16)}, "must have the same dtype"),
    "no table": ({"window": SLOT}, "needs a table"),
    "a table": ({"table": jnp.zeros(3)}, "has no table"),
    "slots of all": ({"window": Window(None, True, "softmax", "slot"), "table": jnp.zeros(3)}, "with a size"),
    "table on a TPU": ({"window": SLOT, "table": jnp.zeros(29), "backend": "tpu"}, "looks up a table"),
    "tile": ({"sizes": (24, 16)}, "powers of two"),
    "small tile": ({"sizes": (16, 8)}, "powers of two"),
    "weights": ({"weight": jnp.ones(53)}, "weights"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(change, message):
    change = dict(change)
    zeros = jnp.zeros(change.pop("rows", 53), jnp.int32)
    rows = RowInfo(zeros, zeros, zeros, zeros, zeros > 0, change.pop("weight", None))
    shape = {"q": jnp.zeros((53, KEY_SIZE)), "k": jnp.zeros((53, KEY_SIZE)), "v": jnp.zeros((53, VALUE_SIZE))}
    given = {"window": NONE, "table": None, **shape, "left": 5, "right": 0, "backend": "interpret", "sizes": SIZES}
    with pytest.raises(ValueError, match=message):
        attend_packed(**{**given, **change}, rows=rows, count=jnp.int32(0))


def test_refuses_windows_that_do_not_fit_into_a_tpu():
    window, shape = Window(None, True, "softmax", "none"), jax.ShapeDtypeStruct
    total = 16383 + 2 * 16384
    integers = shape((total,), jnp.int32)
    rows = RowInfo(integers, integers, integers, integers, shape((total,), bool))
    q, v = (shape((total, size), jnp.float32) for size in (64, 256))
    run = functools.partial(attend_packed, window, None, left=16383, right=0, backend="tpu")
    with pytest.raises(ValueError, match="does not fit"):
        jax.eval_shape(run, q, q, v, rows, shape((), jnp.int32))


def test_says_what_it_refuses():
    assert unsupported_reason(NONE, "tpu") is None
    assert unsupported_reason(SLOT, "triton") is None
    assert "table" in unsupported_reason(SLOT, "tpu")


@pytest.mark.parametrize(
    ("backend", "version", "notice"),
    [("gpu", (0, 11, 2), True), ("gpu", (0, 10, 2), False), ("tpu", (0, 11, 2), False), ("cpu", (0, 11, 2), False)],
)
def test_a_deprecated_backend_is_named_when_it_is_chosen(monkeypatch, backend, version, notice):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "__version_info__", version)
    said = kernel_notice()
    assert (said is not None and "Triton" in said and "'blocks'" in said) if notice else said is None
