"""Split sequences against whole ones on one device: values, gradients, and the collectives that were promised."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, value_and_vjp
from jax.sharding import AxisType, PartitionSpec

from seqboat.layers.mixers.ema import EMA
from seqboat.ops import ema, recurrence
from seqboat.ops.ema import EMAParams
from seqboat.parallel import sequence

BATCH, LENGTH, WIDTH, STATES = 2, 48, 3, 4
SPLIT, WHOLE = PartitionSpec(None, "sequence"), PartitionSpec()


def sharded(fn, shards, in_specs, out_specs):
    mesh = jax.make_mesh((shards,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def count(name, compiled):
    """How many collectives of this name a compiled program has, synchronous or not."""
    return len(re.findall(rf" {name}(?:-start)?\(", compiled.as_text()))


def permutes(shards):
    return 0 if shards == 1 else 1 + math.ceil(math.log2(shards - 1))


# ---- exclusive_scan


def products(matrices, reverse):
    """The 2 x 2 product of all matrices before each, or after it: in order, one by one."""
    out, total = [], jnp.eye(2)
    for matrix in matrices[::-1] if reverse else matrices:
        out.append(total)
        total = matrix @ total if reverse else total @ matrix
    return jnp.stack(out[::-1] if reverse else out)


@pytest.mark.parametrize("shards", grid((1, 2, 3, 5, 8), 5))
def test_a_scan_combines_all_shards_before_in_order(shards):
    def piece(matrices):
        scan = functools.partial(sequence.exclusive_scan, jnp.matmul, matrices, jnp.eye(2)[None], "sequence")
        return scan(), scan(reverse=True)

    along = PartitionSpec("sequence")
    expected = value_and_vjp(lambda matrices: (products(matrices, False), products(matrices, True)))
    cotangent = normal(0, shards, 2, 2), normal(1, shards, 2, 2)
    matrices = normal(2, shards, 2, 2)
    run = value_and_vjp(sharded(piece, shards, (along,), (along, along))).lower(cotangent, matrices).compile()
    assert_close(run(cotangent, matrices), expected(cotangent, matrices))
    assert count("collective-permute", run) == 2 * 2 * permutes(shards)


# ---- convolve


def make_params(directions, slow):
    """`slow`: decays of 1e-3 down to 1e-6 an element, so that everything reaches the last shard."""
    offset = jnp.asarray([[-3.5], [-5.0], [-6.9]] * directions) if slow else 0
    delta, alpha, beta, gamma = (normal(i, directions * WIDTH, STATES) for i in range(4))
    return EMAParams(delta + offset, alpha + offset, beta, gamma, normal(4, WIDTH))


def split_average(shards, method):
    piece = lambda params, x, valid: sequence.convolve(params, x, valid, "sequence", method)
    run = sharded(piece, shards, (WHOLE, SPLIT, SPLIT), SPLIT)
    # The gradient of `valid` is of no interest.
    return jax.jit(lambda cotangent, params, x, valid: value_and_gradient(run, cotangent, params, x, valid))


def value_and_gradient(fn, cotangent, params, x, valid):
    y, transpose = jax.vjp(lambda params, x: fn(params, x, valid), params, x)
    return y, transpose(cotangent)


REFERENCE = jax.jit(
    functools.partial(value_and_gradient, lambda params, x, valid: ema.convolve(params, x, valid, method="reference"))
)


@pytest.mark.parametrize(
    ("shards", "directions", "method"),
    grid(
        [(1, 2, "fft"), (2, 1, "chunked"), (3, 2, "fft"), (8, 1, "fft"), (8, 2, "fft"), (8, 2, "chunked")],
        (8, 1, "fft"),  # both directions: test_steps.py
    ),
)
def test_an_average_in_pieces_equals_the_whole(shards, directions, method, monkeypatch):
    monkeypatch.setattr(ema, "CHUNK", 4)  # no divisor of the 6 elements of an eighth
    x, cotangent = normal(5, BATCH, LENGTH, WIDTH), normal(6, BATCH, LENGTH, WIDTH)
    everything = jnp.ones((BATCH, LENGTH), bool)
    padded = jnp.arange(LENGTH)[None, :] < jnp.asarray([[11], [41]])
    run = split_average(shards, method).lower(cotangent, make_params(directions, False), x, padded).compile()
    for slow in (False, True):
        for valid in (everything, padded):
            args = cotangent, make_params(directions, slow), x, valid
            assert_close(run(*args), REFERENCE(*args))
    # As many for the gradient as for the value, and nothing else but the sum of the parameters' gradients.
    assert count("collective-permute", run) == 2 * directions * permutes(shards)
    assert not count("all-gather", run) + count("all-to-all", run)


@pytest.mark.parametrize("method", ["fft", "chunked"])
def test_the_layer_averages_its_piece_by_its_method(method):
    layer = EMA(STATES, False, method=method, axis="sequence")
    x, valid = normal(5, BATCH, LENGTH, WIDTH), jnp.ones((BATCH, LENGTH), bool)
    run = sharded(lambda params, x, valid: layer.apply({"params": params}, x, valid), 2, (WHOLE, SPLIT, SPLIT), SPLIT)
    jaxpr = str(jax.make_jaxpr(run)(make_params(2, False)._asdict(), x, valid))
    assert ("fft[" in jaxpr) == (method == "fft")


@pytest.mark.breadth  # test_an_average_in_pieces_equals_the_whole
def test_half_precision_is_exchanged_in_float32():
    params, x = make_params(2, True), jnp.asarray(normal(5, BATCH, LENGTH, WIDTH), jnp.bfloat16)
    piece = lambda params, x: sequence.convolve(params, x, None, "sequence")
    y = jax.jit(sharded(piece, 8, (WHOLE, SPLIT), SPLIT))(params, x)
    assert y.dtype == jnp.bfloat16
    # Half an ulp: float32 before the cast, so that rounding is all that differs from the float32 result.
    whole = ema.convolve(params, x.astype(jnp.float32), method="reference")
    assert_close(y.astype(jnp.float32), whole, 2**-8)


@pytest.mark.parametrize("method", grid(("fft", "chunked"), "fft"))
def test_states_of_all_elements_are_never_in_memory(method):
    batch, length, width, states = 2, 4096, 5, 16
    weights = jax.ShapeDtypeStruct((2 * width, states), jnp.float32)
    params = EMAParams(weights, weights, weights, weights, jax.ShapeDtypeStruct((width,), jnp.float32))
    x = jax.ShapeDtypeStruct((batch, 2 * length, width), jnp.float32)
    valid = jax.ShapeDtypeStruct((batch, 2 * length), bool)
    jaxpr = str(split_average(2, method).trace(x, params, x, valid).jaxpr)
    assert ("fft[" in jaxpr) == (method == "fft")
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", jaxpr)]
    assert batch * length * width in sizes
    assert max(sizes) < batch * length * width * states / 4
    # Empty residuals of a shard_map crash the compiler of jaxlib 0.11.2.
    assert min(sizes) > 0


# ---- linear


@pytest.mark.parametrize("shards", grid((1, 3, 8), 3))
def test_a_linear_recurrence_in_pieces_equals_the_whole(shards):
    """In both directions, with padding over several shards, and decays with which everything reaches the last one."""
    decay = jnp.asarray([0.999, 0.99 * np.exp(2j), 0.5 * np.exp(-1j)], jnp.complex64)
    make = lambda seed: jax.lax.complex(*(normal(seed + i, BATCH, LENGTH, WIDTH) for i in range(2)))
    valid = jnp.arange(LENGTH)[None, :] < jnp.asarray([[LENGTH], [11]])

    def both(linear):
        return lambda decay, x, valid: [linear(decay, x, valid, reverse=reverse) for reverse in (False, True)]

    piece = both(functools.partial(sequence.linear, axis="sequence"))
    whole = both(lambda *args, reverse: recurrence.linear(*args, reverse=reverse)[0])
    run = jax.jit(functools.partial(value_and_gradient, sharded(piece, shards, (WHOLE, SPLIT, SPLIT), SPLIT)))
    args = [make(6), make(8)], decay, make(4), valid
    run = run.lower(*args).compile()
    assert_close(run(*args), jax.jit(functools.partial(value_and_gradient, whole))(*args))
    assert count("collective-permute", run) == 2 * 2 * permutes(shards)


# ---- last_active

ACTIVATIONS = {
    "none": lambda t: t < 0,
    "one": lambda t: t == 7,
    "sparse": lambda t: np.isin(t, [0, 1, 4, 5, 22, 40, 41, 47]),
    "many": lambda t: t * t % 7 < 3,
    "all": lambda t: t >= 0,
}


def neighbours(active, shards, size, reverse):
    """Where the rows of each shard's answer stand, (S, B, size), -1 where there is none: by a plain loop."""
    found = np.full((shards, BATCH, size), -1)
    piece = LENGTH // shards
    for shard in range(shards):
        for b in range(BATCH):
            where = np.flatnonzero(active[b])
            if reverse:
                where = where[where >= (shard + 1) * piece][:size]
                found[shard, b, : len(where)] = where
            else:
                where = where[where < shard * piece][-size:]
                found[shard, b, size - len(where) :] = where
    return found


def split_last_active(shards, size):
    """Rows, positions, there of every shard for both directions, and the gradient of the rows."""
    along = PartitionSpec("sequence")

    def piece(rows, active):
        both = [sequence.last_active(rows, active, size, "sequence", reverse=reverse) for reverse in (False, True)]
        return jax.tree.map(lambda a: a[None], both)

    run = sharded(piece, shards, (SPLIT, SPLIT), along)

    def floats(x, position, active):
        both = run({"x": x, "position": position}, active)
        return [rows["x"] for rows, _ in both], [(rows["position"], there) for rows, there in both]

    @jax.jit
    def compute(cotangent, x, position, active):
        y, transpose, rest = jax.vjp(lambda x: floats(x, position, active), x, has_aux=True)
        return y, rest, transpose(cotangent)[0]

    return compute


@pytest.mark.parametrize(("shards", "size"), grid([(1, 4), (3, 20), (8, 4), (8, 9)], (8, 4)))
def test_the_last_active_rows_of_all_shards_before(shards, size):
    run = split_last_active(shards, size)
    x, position = normal(5, BATCH, LENGTH, WIDTH), np.arange(100, 100 + BATCH * LENGTH).reshape(BATCH, LENGTH)
    cotangent = [normal(6 + i, shards, BATCH, size, WIDTH) for i in range(2)]
    for name, chosen in ACTIVATIONS.items():
        # The second sequence is shifted, so that the two have different rows.
        active = np.stack([chosen(np.arange(LENGTH)), np.roll(chosen(np.arange(LENGTH)), 2)])
        y, rest, gradient = run(cotangent, x, position, active)
        expected = np.zeros(x.shape)
        for i, reverse in enumerate((False, True)):
            where = neighbours(active, shards, size, reverse)
            there, row = where >= 0, np.arange(BATCH)[None, :, None]
            np.testing.assert_array_equal(rest[i][1], there, err_msg=name)
            np.testing.assert_array_equal(rest[i][0], np.where(there, position[row, where], 0), err_msg=name)
            np.testing.assert_array_equal(y[i], np.where(there[..., None], x[row, where], 0), err_msg=name)
            np.add.at(expected, (row, where), np.where(there[..., None], cotangent[i], 0))
        assert_close(gradient, expected)
    # Only the indices of slots are scattered, no row and no gradient.
    text = str(run.trace(cotangent, x, position, active).jaxpr)
    assert set(re.findall(r":(\w+)\[[\d,]*\] = scatter", text)) == {"i32"}
