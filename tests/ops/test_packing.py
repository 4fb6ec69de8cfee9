"""Packing: slots, gathers and their transposes against loops, and functions over blocks against plain evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal

from seqboat.ops.blocks import Blocks, map_blocks
from seqboat.ops.packing import compress, extract, pack, row_info

PATTERNS = {
    "none": np.zeros((3, 7), bool),
    "one": np.eye(3, 7, 4, dtype=bool) & (np.arange(3)[:, None] == 1),
    "some": np.random.default_rng(0).random((3, 7)) < 0.4,
    "empty row": (np.random.default_rng(1).random((3, 7)) < 0.7) & (np.arange(3)[:, None] != 1),
    "all": np.ones((3, 7), bool),
    "single element": np.ones((1, 1), bool),
}


@pytest.fixture(params=PATTERNS.values(), ids=PATTERNS)
def active(request):
    return jnp.asarray(request.param)


@pytest.mark.parametrize(
    ("block_size", "left", "right"),
    grid([(1, 0, 0), (4, 0, 0), (100, 0, 0), (4, 3, 5), (4, 1, 0)], (4, 3, 5), (100, 0, 0)),
)
def test_active_rows_fill_the_slots_after_the_left_margin_in_order(active, block_size, left, right):
    packing = pack(active, block_size, left=left, right=right)
    rows = np.flatnonzero(active)
    capacity = -(-active.size // block_size) * block_size
    assert packing.filled == len(rows)
    assert packing.source.tolist() == [-1] * left + rows.tolist() + [-1] * (capacity - len(rows) + right)
    slots = np.full(active.size, -1)
    slots[rows] = left + np.arange(len(rows))
    assert packing.slot.tolist() == slots.tolist()


def test_every_row_is_described_as_loops_would(active):
    rows = row_info(active)
    index = 0
    for segment, row in enumerate(np.asarray(active)):
        for position, is_active in enumerate(row):
            expected = (segment, position, row[:position].sum(), row.sum(), is_active)
            assert tuple(int(leaf[index]) for leaf in rows[:5]) == tuple(map(int, expected))
            index += 1
    assert rows.weight is None


@jax.jit
def there_and_back(active, x):
    """Compressed, extracted from there, and how many rows are active."""
    packing = pack(active, 4)
    packed = compress(x, packing)
    return packed, extract(packed, packing), packing.filled


def test_compress_then_extract_keeps_active_rows_and_zeroes_the_others(active):
    flat = np.asarray(active).reshape(-1)
    x = {"float": normal(0, flat.size, 2), "integer": jnp.arange(1, flat.size + 1), "bool": jnp.ones(flat.size, bool)}
    packed, extracted, count = jax.tree.map(np.asarray, there_and_back(active, x))
    x = jax.tree.map(np.asarray, x)
    for name, leaf in packed.items():
        np.testing.assert_array_equal(leaf[:count], x[name][flat])
        assert not leaf[count:].any()
        back = extracted[name]
        np.testing.assert_array_equal(back[flat], x[name][flat])
        assert not back[~flat].any()
        assert back.dtype == x[name].dtype


@jax.jit
def with_gradients(active, x, slots):
    """Compressed rows with the gradient by them, and extracted slots with the gradient by these."""
    packing = pack(active, 4)
    packed, of_rows = jax.vjp(lambda x: compress(x, packing), x)
    extracted, of_slots = jax.vjp(lambda slots: extract(slots, packing), slots)
    return packed, of_rows(slots)[0], extracted, of_slots(x)[0]


def test_gradients_of_compress_and_extract_are_their_transposes(active):
    x, slots = normal(0, active.size, 2), normal(1, -(-active.size // 4) * 4, 2)
    packed, by_rows, extracted, by_slots = jax.tree.map(np.asarray, with_gradients(active, x, slots))
    assert_close(np.vdot(slots, packed), np.vdot(extracted, x), floor=1)
    np.testing.assert_array_equal(by_rows, extracted)
    np.testing.assert_array_equal(by_slots, packed)


def test_nan_in_inactive_rows_and_empty_slots_is_not_read():
    active = jnp.asarray(PATTERNS["some"])
    packing, flat = pack(active, 4), PATTERNS["some"].reshape(-1)
    x = jnp.where(flat[:, None], normal(0, flat.size, 2), jnp.nan)
    assert np.isfinite(jax.jit(compress)(x, packing)).all()
    slots = jnp.where((packing.source >= 0)[:, None], 1.0, jnp.nan)
    assert np.isfinite(jax.jit(extract)(slots, packing)).all()


# A windowed function of blocks: every row adds up its neighbours, weighted by a product of what both carry.

ROWS, WIDTH = 12, 3


def neighbours(params, own, halo, *, left, right):
    size = own["x"].shape[0]
    y = jnp.tanh(own["x"] @ params["matrix"]) * own["factor"][:, None]
    for offset in range(left + right + 1):
        near = halo["x"][offset : offset + size] * halo["mask"][offset : offset + size, None]
        y = y + params["steps"] * params["kernel"][offset] * near * own["x"]
    return {"y": y, "rank": own["factor"] + 1}


def arguments(left, right):
    params = {"matrix": normal(0, WIDTH, WIDTH), "kernel": normal(1, left + right + 1), "steps": jnp.asarray(2)}
    own = {"x": normal(2, ROWS, WIDTH), "factor": jnp.arange(1, ROWS + 1)}
    halo = {"x": normal(3, ROWS, WIDTH), "mask": jnp.arange(ROWS) % 3 > 0}
    return params, own, halo


def floats(tree):
    """The part of a tree that has gradients."""
    return {name: leaf for name, leaf in tree.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}


def evaluate(run, params, own, halo, count, cotangent):
    """The value of y and rank, and the gradients of <cotangent, y> for every float leaf."""

    def scalar(params_, own_, halo_):
        out = run(params | params_, own | own_, halo | halo_, count)
        return jnp.vdot(out["y"], cotangent), out

    gradient = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)
    return gradient(floats(params), floats(own), floats(halo))


def plain(params, own, halo, count, *, block_size, left, right):
    """One evaluation over all rows at once, of which the blocks that hold the first `count` are kept."""
    padded = jax.tree.map(lambda leaf: jnp.pad(leaf, [(left, right)] + [(0, 0)] * (leaf.ndim - 1)), halo)
    out = neighbours(params, own, padded, left=left, right=right)
    computed = jnp.arange(ROWS) < -(-count // block_size) * block_size
    return jax.tree.map(lambda leaf: jnp.where(computed.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), out)


def blocked(params, own, halo, count, *, block_size, left, right, blocks_per_iteration=1, wanted=None):
    """With margins of zeros around all rows."""
    fn = functools.partial(neighbours, left=left, right=right)
    own, halo = jax.tree.map(lambda leaf: jnp.pad(leaf, [(left, right)] + [(0, 0)] * (leaf.ndim - 1)), (own, halo))
    out = map_blocks(fn, params, own, halo, Blocks(count, block_size, left, right, blocks_per_iteration, wanted))
    return jax.tree.map(lambda leaf: leaf[left : left + ROWS], out)


BLOCKS = [(4, 0, 0), (4, 2, 0), (4, 2, 2), (3, 5, 4), (1, 1, 0), (12, 11, 11)]


@pytest.mark.parametrize(("block_size", "left", "right"), grid(BLOCKS, (3, 5, 4)))
def test_blocks_equal_plain_evaluation_in_values_and_gradients(block_size, left, right):
    sizes = {"block_size": block_size, "left": left, "right": right}
    args, cotangent = arguments(left, right), normal(4, ROWS, WIDTH)
    reference, fast = (jax.jit(functools.partial(evaluate, functools.partial(f, **sizes))) for f in (plain, blocked))
    for count in (0, 1, 5, 8, ROWS):
        assert_close(fast(*args, jnp.int32(count), cotangent), reference(*args, jnp.int32(count), cotangent))


@pytest.mark.parametrize(("block_size", "left", "right"), grid([(2, 2, 0), (2, 2, 2), (3, 5, 4), (2, 0, 0)], (2, 2, 0)))
def test_several_blocks_at_once_are_as_one(block_size, left, right):
    """Two at once compute whole trips, so the reference's blocks are as long as a trip."""
    args, cotangent = arguments(left, right), normal(4, ROWS, WIDTH)
    sizes = {"left": left, "right": right}
    reference = functools.partial(plain, block_size=2 * block_size, **sizes)
    fast = functools.partial(blocked, block_size=block_size, blocks_per_iteration=2, **sizes)
    reference, fast = (jax.jit(functools.partial(evaluate, f)) for f in (reference, fast))
    for count in (0, 1, 5, ROWS):
        assert_close(fast(*args, jnp.int32(count), cotangent), reference(*args, jnp.int32(count), cotangent))


def test_rows_that_no_block_reads_may_hold_anything():
    """Five rows in blocks of four with a halo of two: rows 0-7 are read, and 8 and 9 by the last block's right side."""
    sizes = {"block_size": 4, "left": 2, "right": 2}
    params, own, halo = arguments(2, 2)
    poison = lambda x, start: jnp.where((jnp.arange(ROWS) >= start)[:, None], jnp.nan, x)
    args = params, own | {"x": poison(own["x"], 8)}, halo | {"x": poison(halo["x"], 10)}
    run = jax.jit(functools.partial(evaluate, functools.partial(blocked, **sizes)))
    cotangent = poison(normal(4, ROWS, WIDTH), 8)
    got, out = run(*args, jnp.int32(5), jnp.where(jnp.isnan(cotangent), 0, cotangent))
    expected, clean = run(params, own, halo, jnp.int32(5), jnp.where(jnp.isnan(cotangent), 0, cotangent))
    assert_close((got, out), (expected, clean))


def test_cotangents_of_blocks_that_did_not_run_are_not_read():
    fn = functools.partial(blocked, block_size=4, left=2, right=2)
    args = arguments(2, 2)
    cotangent = normal(4, ROWS, WIDTH)
    poisoned = jnp.where((jnp.arange(ROWS) >= 8)[:, None], jnp.nan, cotangent)

    @jax.jit
    def gradient(cotangent):
        run = lambda x: fn(args[0], args[1] | {"x": x}, args[2], jnp.int32(5))["y"]
        return jax.vjp(run, args[1]["x"])[1](cotangent)

    assert_close(gradient(poisoned), gradient(cotangent))


def test_integer_and_boolean_leaves_get_no_gradient():
    args = arguments(1, 0)
    fn = lambda *args: blocked(*args, jnp.int32(5), block_size=4, left=1, right=0)["y"].sum()
    gradients = jax.jit(jax.grad(fn, argnums=(0, 1, 2), allow_int=True))(*args)
    for gradient, arg in zip(jax.tree.leaves(gradients), jax.tree.leaves(args), strict=True):
        expected = arg.dtype if jnp.issubdtype(arg.dtype, jnp.floating) else jax.dtypes.float0
        assert gradient.dtype == expected
        assert gradient.shape == arg.shape


def test_the_number_of_blocks_that_run_follows_the_count():
    calls = []
    fn = lambda params, own, halo: jax.debug.callback(lambda: calls.append(1)) or own
    run = jax.jit(lambda count: map_blocks(fn, None, jnp.ones((ROWS, 1)), None, Blocks(count, 4)))
    for count, blocks in ((0, 0), (1, 1), (4, 1), (5, 2), (12, 3)):
        calls.clear()
        jax.block_until_ready(run(jnp.int32(count)))
        jax.effects_barrier()
        assert len(calls) == blocks


def test_blocks_without_a_wanted_row_do_not_run_in_values_and_gradients():
    args, cotangent = arguments(2, 2), normal(4, ROWS, WIDTH)
    sizes = {"block_size": 2, "left": 2, "right": 2}
    wanted = jnp.zeros(ROWS, bool).at[jnp.array([3, 4, 9])].set(True)
    runs = jnp.repeat(wanted.reshape(-1, 2).any(1), 2)
    fast = jax.jit(functools.partial(evaluate, functools.partial(blocked, **sizes, wanted=jnp.pad(wanted, 2))))
    reference = jax.jit(functools.partial(evaluate, functools.partial(plain, **sizes)))
    gradients, out = reference(*args, jnp.int32(ROWS), cotangent * runs[:, None])
    expected = gradients, jax.tree.map(lambda leaf: jnp.where(runs.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), out)
    assert_close(fast(*args, jnp.int32(ROWS), cotangent), expected)


def test_rows_that_are_not_a_whole_number_of_blocks_are_rejected():
    run = lambda halo, *sizes: map_blocks(
        lambda params, own, halo: own, None, jnp.ones(12), halo, Blocks(jnp.int32(1), *sizes)
    )
    with pytest.raises(ValueError, match="not the same whole number of blocks of 5"):
        run(None, 5)
    with pytest.raises(ValueError, match="not the same whole number of blocks of 4"):
        run(jnp.ones(8), 4)
    with pytest.raises(ValueError, match="blocks of 4 between margins of 2 and 1"):
        run(None, 4, 2, 1)
