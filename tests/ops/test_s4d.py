"""S4D: convolution, recurrence and kernel against complex128 loops and one another, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, value_and_vjp

from seqboat.ops import s4d
from seqboat.ops.convolution import direct_convolve
from seqboat.ops.s4d import S4DParams

BATCH, WIDTH, STATES = 2, 3, 4


def make_params(directions=1):
    rows = directions * WIDTH
    log_step = jnp.linspace(np.log(1e-2), np.log(1e-1), rows)
    frequency = jnp.broadcast_to(np.pi * jnp.arange(STATES), (rows, STATES))
    spread = normal(1, rows, STATES) / 10
    return S4DParams(
        log_step, spread - 0.7, frequency, normal(2, rows, STATES), normal(3, rows, STATES), normal(4, WIDTH)
    )


def numpy_kernel(params, length):
    log_step, log_decay, frequency, c_real, c_imag = (np.asarray(a, np.float64) for a in params[:5])
    a = -np.exp(log_decay) + 1j * frequency
    dt_a = np.exp(log_step)[:, None] * a
    weight = (c_real + 1j * c_imag) * (np.exp(dt_a) - 1) / a
    return np.stack([2 * (weight * np.exp(lag * dt_a)).sum(1).real for lag in range(length)], 1)


def reference(params, x, *, truncation=None):
    """The definition: a sum with the kernel that no exponential is shared in."""
    taps = s4d.naive_kernel(params, min(truncation or x.shape[1], x.shape[1]))
    directions = [taps[:WIDTH], taps[WIDTH:]] if taps.shape[0] > WIDTH else [taps]
    return direct_convolve(x, *directions) + params.skip[None, None] * x


@pytest.mark.parametrize("length", grid((1, 7, 63), 63))
def test_factored_kernel_equals_its_definition(length):
    params, cotangent = make_params(), normal(5, WIDTH, length)
    expected = value_and_vjp(functools.partial(s4d.naive_kernel, length=length))(cotangent, params)
    assert_close(expected[0], numpy_kernel(params, length))
    assert_close(value_and_vjp(functools.partial(s4d.kernel, length=length))(cotangent, params), expected)


@pytest.mark.parametrize(
    ("length", "directions", "truncation"),
    grid([(1, 2, None), (7, 1, None), (7, 2, 5), (63, 2, None), (63, 1, 5)], (7, 2, 5)),
)
def test_convolution_equals_the_reference(length, directions, truncation):
    params, x, cotangent = make_params(directions), normal(5, BATCH, length, WIDTH), normal(6, BATCH, length, WIDTH)
    expected = value_and_vjp(functools.partial(reference, truncation=truncation))(cotangent, params, x)
    got = value_and_vjp(lambda params, x: s4d.convolve(params, x, truncation=truncation))(cotangent, params, x)
    assert_close(got, expected)


@pytest.mark.breadth  # test_stream_in_padded_pieces_equals_the_whole
def test_recurrent_steps_equal_the_convolution():
    params, x, cotangent = make_params(), normal(5, BATCH, 63, WIDTH), normal(6, BATCH, 63, WIDTH)

    def recurrence(params, x):
        start = jnp.zeros((BATCH, WIDTH, STATES), jnp.complex64)
        return jax.lax.scan(functools.partial(s4d.recurrent_step, params), start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    expected = value_and_vjp(s4d.convolve)(cotangent, params, x)
    assert_close(value_and_vjp(recurrence)(cotangent, params, x), expected)


def test_stream_in_padded_pieces_equals_the_whole():
    params, x = make_params(), normal(5, 2, 9, WIDTH)
    state, done = jnp.zeros((2, WIDTH, STATES), jnp.complex64), np.zeros(2, int)
    whole, stream = np.asarray(jax.jit(s4d.convolve)(params, x)), jax.jit(s4d.stream)
    for lengths in ([3, 0], [2, 4], [4, 5]):
        pieces = np.stack([np.resize(x[i, done[i] :], (5, WIDTH)) for i in range(2)])
        state, y = stream(params, state, jnp.asarray(pieces), jnp.array(lengths))
        for i, count in enumerate(lengths):
            assert_close(y[i, :count], whole[i, done[i] : done[i] + count])
            done[i] += count
    with pytest.raises(ValueError, match="cannot be streamed"):
        s4d.stream(make_params(2), state, x, jnp.array([9, 9]))


@pytest.mark.breadth  # test_stream_in_padded_pieces_equals_the_whole
def test_elements_that_are_not_valid_enter_as_zeros():
    params, x = make_params(2), normal(5, BATCH, 7, WIDTH)
    valid = normal(7, BATCH, 7) > -0.3
    got = s4d.convolve(params, x, valid)
    zeroed = s4d.convolve(params, jnp.where(valid[..., None], x, 0))
    assert_close(got[valid], zeroed[valid])
    poisoned = s4d.convolve(params, jnp.where(valid[..., None], x, jnp.nan), valid)
    assert_close(poisoned[valid], got[valid])
