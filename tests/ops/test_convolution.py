"""Long convolutions: the FFT form against the Toeplitz form, and both against a plain sum in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, assert_close, grid, normal, value_and_vjp

from seqboat.ops import convolution
from seqboat.ops.convolution import direct_convolve, fft_convolve

BATCH, WIDTH = 2, 3
SIZES = [(1, 1, 2), (7, 7, 1), (7, 7, 2), (7, 3, 2), (7, 9, 2), (63, 63, 1), (63, 63, 2), (63, 5, 2)]


def plain_sum(x, forward, backward=None):
    """The definition, one product at a time."""
    x, forward = np.asarray(x, np.float64), np.asarray(forward, np.float64)
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for lag in range(forward.shape[1]):
            if t - lag >= 0:
                y[:, t] += forward[:, lag] * x[:, t - lag]
            if backward is not None and t + lag < x.shape[1]:
                y[:, t] += np.asarray(backward[:, lag]) * x[:, t + lag]
    return y


def arguments(length, taps, directions):
    return normal(0, BATCH, length, WIDTH), *(normal(1 + i, WIDTH, taps) for i in range(directions))


@pytest.mark.parametrize(("length", "taps", "directions"), grid(SIZES, (7, 9, 2)))
def test_fft_form_equals_the_sum_in_values_and_gradients(length, taps, directions):
    args, cotangent = arguments(length, taps, directions), normal(9, BATCH, length, WIDTH)
    expected = value_and_vjp(direct_convolve)(cotangent, *args)
    assert_close(expected[0], plain_sum(*args))
    assert_close(value_and_vjp(fft_convolve)(cotangent, *args), expected)


@pytest.mark.breadth  # test_fft_form_equals_the_sum_in_values_and_gradients
def test_an_impulse_gives_the_kernel():
    x = jnp.zeros((1, 7, 1)).at[0, 2].set(1)
    forward, backward = jnp.array([[1.0, 2, 3]]), jnp.array([[10.0, 20, 30]])
    assert_close(jax.jit(fft_convolve)(x, forward, backward)[0, :, 0], np.array([30, 20, 11, 2, 3, 0, 0], np.float32))


def test_half_precision_comes_back_as_half_precision():
    x, forward = arguments(7, 7, 1)
    half = jax.jit(fft_convolve)(jnp.asarray(x, jnp.bfloat16), forward)
    assert half.dtype == jnp.bfloat16
    assert_close(half, plain_sum(x, forward), BF16)


def test_nothing_wraps_around_the_circle():
    """The gradient of the last output reaches `taps` elements back and no further."""
    x, forward = arguments(63, 5, 1)
    reach = jax.jit(jax.grad(lambda x: fft_convolve(x, forward)[0, jnp.array([0, 62])].sum()))(x)
    seen = np.flatnonzero(np.abs(np.asarray(reach[0])).max(1) > 1e-5)
    assert seen.tolist() == [0, 58, 59, 60, 61, 62]


@pytest.mark.parametrize("rows", grid((1, 4, 9), 9))
def test_swap_exchanges_the_last_two_axes_and_so_does_its_gradient(rows, monkeypatch):
    monkeypatch.setattr(convolution, "PIECE", 4)
    x, cotangent = normal(0, 2, rows, 3), normal(1, 2, 3, rows)
    y, (gradient,) = value_and_vjp(convolution.swap)(cotangent, x)
    np.testing.assert_array_equal(y, x.swapaxes(1, 2))
    np.testing.assert_array_equal(gradient, cotangent.swapaxes(1, 2))


def test_swap_loops_on_a_cpu_alone():
    traced = jax.jit(convolution.swap).trace(jax.ShapeDtypeStruct((2, 300, 3), jnp.float32))
    loops = {name: "while" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    assert loops == {"cpu": True, "cuda": False, "tpu": False}
