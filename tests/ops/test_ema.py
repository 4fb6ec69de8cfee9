"""The damped EMA: every form against the reference in values and gradients, the reference against float64 loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, assert_close, grid, normal, value_and_vjp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve

from seqboat.ops import ema
from seqboat.ops.ema import EMAParams

BATCH, WIDTH, STATES = 2, 3, 4


def make_params(directions=1):
    rows = directions * WIDTH
    return EMAParams(*(normal(i, rows, STATES) for i in range(4)), omega=normal(4, WIDTH))


def numpy_kernel(params, length):
    delta, alpha, beta, gamma = (np.asarray(a, np.float64) for a in params[:4])
    p = 1 / (1 + np.exp(-delta))
    q = 1 - p / (1 + np.exp(-alpha))
    return np.stack([(gamma / np.sqrt(STATES) * p * beta * q**lag).sum(1) for lag in range(length)], 1)


def numpy_average(params, x, valid=None, truncation=None):
    """The definition of both directions, in float64."""
    x = np.asarray(x, np.float64)
    length = x.shape[1]
    signal = x if valid is None else np.where(np.asarray(valid)[..., None], x, 0)
    y = np.asarray(params.omega, np.float64) * x
    for ahead in (False, True)[: 1 + params.bidirectional]:
        kappa = numpy_kernel(params.direction(ahead), length if truncation is None else min(truncation, length))
        for t in range(length):
            for lag in range(kappa.shape[1]):
                source = t + lag if ahead else t - lag
                if 0 <= source < length:
                    y[:, t] += kappa[:, lag] * signal[:, source]
    return y


def average(method, truncation=None, valid=None):
    return lambda params, x: ema.convolve(params, x, valid, truncation=truncation, method=method)


@functools.cache
def reference(truncation=None):
    """Values and gradients, compiled once for each shape."""
    return value_and_vjp(average("reference", truncation))


@pytest.mark.parametrize(
    ("length", "directions", "truncation"),
    grid([(1, 2, None), (7, 1, None), (7, 2, 5), (63, 1, None), (63, 2, None)], (7, 2, 5)),
)
def test_fast_forms_equal_the_reference(length, directions, truncation, monkeypatch):
    monkeypatch.setattr(ema, "CHUNK", 8)  # 63 elements are then eight chunks, the last one padded
    params, x, cotangent = make_params(directions), normal(5, BATCH, length, WIDTH), normal(6, BATCH, length, WIDTH)
    expected = reference(truncation)(cotangent, params, x)
    assert_close(expected[0], numpy_average(params, x, truncation=truncation))
    for method in ("fft", "chunked"):
        assert_close(value_and_vjp(average(method, truncation))(cotangent, params, x), expected)


def test_the_dispatcher_takes_the_form_that_its_comment_promises(monkeypatch):
    params, x = make_params(), normal(5, 1, 16, WIDTH)

    def uses_fft(truncation):
        return "fft[" in str(jax.make_jaxpr(average("auto", truncation))(params, x))

    assert uses_fft(None)
    monkeypatch.setattr(ema, "LONGEST_FFT", 15)
    assert not uses_fft(None)
    assert uses_fft(5)
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not uses_fft(None)
    assert not uses_fft(5)


def slow_decay(params):
    """q near 1 - 1e-4: nothing has decayed within these tests."""
    return params._replace(delta=0 * params.delta, alpha=params.alpha / 10 - 8.5)


# test_fast_forms_equal_the_reference
@pytest.mark.parametrize(("directions", "truncations"), grid([(1, (62,)), (2, (21, 24))]))
def test_chunks_compute_a_kernel_of_any_truncation(directions, truncations, monkeypatch):
    """A multiple of a chunk or not, and all but the last lag, whether or not elements have decayed when they leave."""
    monkeypatch.setattr(ema, "CHUNK", 8)

    def in_all(method):
        return lambda params, x: [average(method, truncation)(params, x) for truncation in truncations]

    got, expected = value_and_vjp(in_all("chunked")), value_and_vjp(in_all("reference"))
    params, x = make_params(directions), normal(5, BATCH, 63, WIDTH)
    cotangents = [normal(6 + truncation, BATCH, 63, WIDTH) for truncation in truncations]
    for own in (params, slow_decay(params)):
        assert_close(got(cotangents, own, x), expected(cotangents, own, x))


@pytest.mark.breadth  # test_fast_forms_equal_the_reference; launch/accelerator.sh
def test_chunks_on_an_accelerator(monkeypatch):
    """In both precisions: a bfloat16 signal is multiplied by rounded kernels. Nothing is added by atomics."""
    params, x, cotangent = make_params(2), normal(5, BATCH, 63, WIDTH), normal(6, BATCH, 63, WIDTH)
    half, half_cotangent = x.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
    monkeypatch.setattr(ema, "ACCELERATOR_CHUNK", 8)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = value_and_vjp(average("auto", 21))
    assert "scatter" not in str(jax.make_jaxpr(got)(cotangent, params, x))
    for own in (params, slow_decay(params)):
        assert_close(got(cotangent, own, x), reference(21)(cotangent, own, x))
    y, (d_params, d_x) = got(half_cotangent, params, half)
    assert y.dtype == d_x.dtype == jnp.bfloat16
    expected = reference(21)(half_cotangent.astype(jnp.float32), params, half.astype(jnp.float32))
    assert_close((y, (d_params, d_x)), expected, BF16)


@pytest.mark.parametrize("method", grid(("fft", "chunked", "reference"), "chunked"))
def test_elements_that_are_not_valid_are_averaged_as_zeros(method):
    params, x = make_params(2), normal(5, BATCH, 7, WIDTH)
    valid = normal(7, BATCH, 7) > -0.3
    run = jax.jit(average(method, valid=valid))
    got = run(params, x)
    assert_close(got, numpy_average(params, x, valid))
    poisoned = run(params, jnp.where(valid[..., None], x, jnp.nan))
    assert_close(poisoned[valid], got[valid])


@pytest.mark.parametrize("length", grid((1, 7, 63), 63))
def test_factored_kernel_equals_its_definition(length):
    params, cotangent = make_params(), normal(6, WIDTH, length)
    expected = value_and_vjp(functools.partial(ema.naive_kernel, length=length))(cotangent, params)
    assert_close(expected[0], numpy_kernel(params, length))
    assert_close(value_and_vjp(functools.partial(ema.kernel, length=length))(cotangent, params), expected)


def steps(params, state, x):
    """`recurrent_step` over all elements."""
    state, y = jax.lax.scan(functools.partial(ema.recurrent_step, params), state, x.swapaxes(0, 1))
    return state, y.swapaxes(0, 1)


@pytest.mark.breadth  # test_stream_equals_recurrent_steps_from_any_state, test_fast_forms_equal_the_reference
def test_recurrent_steps_equal_the_convolution():
    params, x, cotangent = make_params(), normal(5, BATCH, 63, WIDTH), normal(6, BATCH, 63, WIDTH)
    recurrence = lambda params, x: steps(params, jnp.zeros((BATCH, WIDTH, STATES)), x)[1]
    expected = value_and_vjp(average("fft"))(cotangent, params, x)
    assert_close(value_and_vjp(recurrence)(cotangent, params, x), expected)


@pytest.mark.parametrize(
    ("length", "form"), grid([(1, "fft"), (8, "fft"), (63, "fft"), (63, "chunked")], (63, "chunked"))
)
def test_stream_equals_recurrent_steps_from_any_state(length, form, monkeypatch):
    if form == "chunked":
        monkeypatch.setattr(ema, "LONGEST_FFT", 0)
        monkeypatch.setattr(ema, "CHUNK", 8)
    args = make_params(), normal(7, BATCH, WIDTH, STATES), normal(5, BATCH, length, WIDTH)
    cotangent = normal(8, BATCH, WIDTH, STATES), normal(6, BATCH, length, WIDTH)
    expected = value_and_vjp(steps)(cotangent, *args)
    assert_close(value_and_vjp(ema.stream)(cotangent, *args), expected)


@pytest.mark.parametrize(
    ("cut", "method"),
    # tests/parallel/test_sequence.py: test_an_average_in_pieces_equals_the_whole
    grid(itertools.product((1, 30), ("fft", "chunked", "reference"))),
)
def test_pieces_joined_by_their_states_equal_the_whole(cut, method, monkeypatch):
    monkeypatch.setattr(ema, "CHUNK", 8)

    def joined(params, x):
        pieces = x[:, :cut], x[:, cut:]
        (first, (behind, _)), (second, (_, before)) = (
            ema.convolve_piece(params, piece, method=method) for piece in pieces
        )
        nothing = jnp.zeros_like(behind)
        first += ema.continuation(params, (nothing, before), pieces[0].shape[1])
        second += ema.continuation(params, (behind, nothing), pieces[1].shape[1])
        return jnp.concatenate([first, second], 1)

    params, x, cotangent = make_params(2), normal(5, BATCH, 63, WIDTH), normal(6, BATCH, 63, WIDTH)
    expected = reference()(cotangent, params, x)
    assert_close(value_and_vjp(joined)(cotangent, params, x), expected)


STREAM = jax.jit(ema.stream)
STEPS = jax.jit(steps)
WHOLE = jax.jit(average("fft"))


@pytest.mark.breadth  # test_stream_equals_recurrent_steps_from_any_state, and test_streaming.py
@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.sampled_from([1, 3, 8]), min_size=1, max_size=8))
def test_streamed_in_any_pieces_equals_the_whole(pieces):
    params, x = make_params(), normal(5, BATCH, 64, WIDTH)
    whole = WHOLE(params, x)
    state, start = jnp.zeros((BATCH, WIDTH, STATES)), 0
    for length in pieces:
        state, y = STREAM(params, state, x[:, start : start + length])
        assert_close(y, whole[:, start : start + length])
        start += length


def test_a_truncated_kernel_is_streamed_in_pieces_of_any_lengths():
    """Each stream at its own pace, in pieces longer and shorter than the window, or step by step."""
    window, params, x = 5, slow_decay(make_params()), normal(5, BATCH, 64, WIDTH)
    whole = jax.jit(average("reference", window))(params, x)
    state, done, rng = (
        ema.initial_state(BATCH, WIDTH, STATES, window, x.dtype),
        np.zeros(BATCH, int),
        np.random.default_rng(0),
    )
    for size in (8, 8, 1, 1, 8, 1, 8, 1, 8):
        count = rng.integers(0, size + 1, BATCH)
        piece = np.full((BATCH, size, WIDTH), np.nan, np.float32)
        for row, source, start, end in zip(piece, x, done, done + count, strict=True):
            row[: end - start] = source[start:end]
        state, y = STREAM(params, state, piece, jnp.asarray(count))
        for row, wanted, start, end in zip(y, whole, done, done + count, strict=True):
            assert_close(row[: end - start], wanted[start:end])
        done += count


@pytest.mark.breadth  # test_a_truncated_kernel_is_streamed_in_pieces_of_any_lengths: the values
def test_gradients_flow_through_pieces_of_a_truncated_kernel():
    def pieces(params, x):
        state, first = ema.stream(params, ema.initial_state(BATCH, WIDTH, STATES, 5, x.dtype), x[:, :9])
        return jnp.concatenate([first, ema.stream(params, state, x[:, 9:])[1]], 1)

    params, x, cotangent = make_params(), normal(5, BATCH, 10, WIDTH), normal(6, BATCH, 10, WIDTH)
    expected = reference(5)(cotangent, params, x)
    assert_close(value_and_vjp(pieces)(cotangent, params, x), expected)


def test_a_truncated_kernel_does_not_drift():
    """Over 100,000 steps with q = 0.9999, where what leaves the window was rounded many times since it entered."""
    length, window, params = 100_000, 1000, slow_decay(make_params())
    x = normal(5, 1, length, WIDTH)
    kernel = numpy_kernel(params, window)
    whole = np.asarray(params.omega) * np.asarray(x[0]) + np.stack(
        [fftconvolve(np.asarray(x[0, :, i], float), kernel[i])[:length] for i in range(WIDTH)], 1
    )

    @jax.jit
    def run(params, x):
        state = ema.initial_state(1, WIDTH, STATES, window, x.dtype)
        return jax.lax.scan(lambda state, now: ema.stream(params, state, now[None, None]), state, x)[1]

    y = run(params, x[0])[:, 0, 0]
    assert_close(y[-2 * window :], whole[-2 * window :])


@pytest.mark.breadth  # test_elements_that_are_not_valid_are_averaged_as_zeros
def test_padding_after_the_valid_elements_has_no_effect():
    """Of three streams, one is given everything, one a part and one nothing, or a piece of one element or none."""
    params, state, x = make_params(), normal(7, 3, WIDTH, STATES), normal(5, 3, 8, WIDTH)
    for lengths in ([8, 5, 0], [1, 0, 0]):
        length = max(lengths)
        poison = jnp.where(
            jnp.arange(length)[None, :, None] < jnp.array(lengths)[:, None, None], x[:, :length], jnp.nan
        )
        after, y = STREAM(params, state, poison, jnp.array(lengths))
        for i, count in enumerate(lengths):
            expected, real = (
                STEPS(params, state[i : i + 1], x[i : i + 1, :count]) if count else (state[i : i + 1], None)
            )
            assert_close(after[i : i + 1], expected)
            if count:
                assert_close(y[i : i + 1, :count], real)


@pytest.mark.breadth  # test_battery.py: layers of half precision; test_fast_forms_equal_the_reference
def test_half_precision_is_computed_in_float32():
    params, x = make_params(), normal(5, BATCH, 63, WIDTH)
    half = jnp.asarray(x, jnp.bfloat16)
    streamed = [
        STREAM(params, ema.initial_state(BATCH, WIDTH, STATES, truncation, half.dtype), half)[1]
        for truncation in (None, 5)
    ]
    for y, truncation in ((WHOLE(params, half), None), (streamed[0], None), (streamed[1], 5)):
        assert y.dtype == jnp.bfloat16
        assert_close(y, numpy_average(params, half, truncation=truncation), BF16)


def test_a_bidirectional_average_is_not_streamed():
    x = normal(5, BATCH, 7, WIDTH)
    with pytest.raises(ValueError, match="cannot be streamed"):
        ema.stream(make_params(2), jnp.zeros((BATCH, WIDTH, STATES)), x)
