"""The selective recurrence: chunks against the scan in values and gradients, the scan against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, value_and_vjp

from seqboat.ops import mamba2, ssd

BATCH, HEADS, CHANNELS, STATES = 2, 3, 4, 5


def make_inputs(length, strength=1.0):
    log_decay = -strength * jnp.abs(normal(1, BATCH, length, HEADS))
    shapes = (BATCH, length, HEADS, CHANNELS), (BATCH, length, STATES), (BATCH, length, STATES)
    x, b, c = (normal(seed, *shape) for seed, shape in zip((0, 2, 3), shapes, strict=True))
    return x, log_decay, b, c, normal(4, BATCH, HEADS, CHANNELS, STATES)


def loop(x, log_decay, b, c, state):
    x, log_decay, b, c, h = (np.asarray(a, np.float64) for a in (x, log_decay, b, c, state))
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        h = np.exp(log_decay[:, t])[..., None, None] * h + np.einsum("bhp,bn->bhpn", x[:, t], b[:, t])
        y[:, t] = np.einsum("bhpn,bn->bhp", h, c[:, t])
    return y, h


@pytest.mark.parametrize("length", grid((1, 19), 19))
def test_chunks_equal_the_scan(length):
    """Chunks that do not divide the length, and one that is longer; decays near 1, and so strong that the exponential
    of their negative sum overflows."""
    cotangent = normal(5, BATCH, length, HEADS, CHANNELS), normal(6, BATCH, HEADS, CHANNELS, STATES)
    forms = [lambda *args, chunk=chunk: ssd.chunked(*args, chunk) for chunk in (8, 64)]
    together = jax.jit(lambda *args: [value_and_vjp(form)(*args) for form in (ssd.reference, *forms)])
    for strength in (1e-3, 1.0, 100.0):
        args = make_inputs(length, strength)
        expected, *got = together(cotangent, *args)
        assert_close(expected[0], loop(*args))
        for one in got:
            # Of decays that vanish, the gradient does too.
            assert_close(one, expected, floor=1e-3)


@pytest.mark.breadth  # test_the_block_equals_its_equations; test_mixers.py
def test_elements_that_change_nothing():
    x, log_decay, b, c, state = make_inputs(9)
    kept = np.arange(9)[None, :, None] < np.asarray([[[9]], [[4]]])
    x, log_decay = jnp.where(kept[..., None], x, 0), jnp.where(kept, log_decay, 0)
    _, after = jax.jit(ssd.chunked, static_argnums=5)(x, log_decay, b, c, state, 4)
    assert_close(after[1:], loop(*(a[1:, :4] for a in (x, log_decay, b, c)), state[1:])[1])
    assert_close(after[:1], loop(*(a[:1] for a in (x, log_decay, b, c)), state[:1])[1])


def make_params(width, inner, heads, taps):
    channels = inner + 2 * STATES
    return mamba2.Mamba2Params(
        normal(0, width, inner + channels + heads) / 2,
        normal(1, taps, channels) / 2,
        normal(2, channels) / 2,
        normal(3, heads),
        normal(4, heads) / 2,
        normal(5, heads),
        1 + normal(6, inner) / 4,
        normal(7, inner, width) / 2,
    )


def numpy_block(params, x):
    """The block's equations in float64, element by element."""
    p = mamba2.Mamba2Params(*(np.asarray(a, np.float64) for a in params))
    silu = lambda a: a / (1 + np.exp(-a))
    x, inner, heads, taps = np.asarray(x, np.float64), len(p.norm_scale), len(p.d), len(p.convolution)
    z, u, dt = np.split(x @ p.in_projection, [inner, -heads], -1)
    padded = np.concatenate([np.zeros_like(u[:, : taps - 1]), u], 1)[:, : u.shape[1] + taps - 1]
    u = np.stack([(p.convolution * padded[:, t : t + taps]).sum(1) for t in range(u.shape[1])], 1)
    v, b, c = np.split(silu(u + p.convolution_bias), [inner, inner + STATES], -1)
    dt, v = np.log1p(np.exp(dt + p.dt_bias)), v.reshape(*v.shape[:2], heads, -1)
    y, _ = loop(dt[..., None] * v, -np.exp(p.a_log) * dt, b, c, np.zeros((len(x), heads, v.shape[-1], STATES)))
    y = (y + p.d[:, None] * v).reshape(z.shape) * silu(z)
    y *= p.norm_scale / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-5)
    return y @ p.out_projection


def test_the_block_equals_its_equations():
    params, x = make_params(6, 8, 2, 3), normal(8, BATCH, 11, 6)
    run = jax.jit(mamba2.advance, static_argnums=4)
    start, valid = mamba2.initial_state(BATCH, 2, 4, STATES, 3), jnp.arange(11)[None] < jnp.asarray([[11], [5]])
    y, state = run(params, x, valid, start, 4)
    assert_close(y[0], numpy_block(params, x)[0])
    assert_close(y[1, :5], numpy_block(params, x)[1, :5])
    # What is handed on is that after the last valid element, the inputs of the convolution too.
    after = run(params, x[1:, 5:9], jnp.ones((1, 4), bool), jax.tree.map(lambda a: a[1:], state), 4)[0]
    assert_close(after[0], numpy_block(params, x)[1, 5:9])


def test_without_steps_of_the_data_every_decay_is_the_same():
    """W_dt = 0: the step is softplus(dt_bias), and the decay between two elements depends on their distance alone."""
    params, x = make_params(6, 8, 2, 3), normal(8, BATCH, 11, 6)
    still = params._replace(in_projection=params.in_projection.at[:, -2:].set(0))
    state = mamba2.initial_state(BATCH, 2, 4, STATES, 3)._replace(heads=jnp.ones((BATCH, 2, 4, STATES)))
    silent = params._replace(convolution=0 * params.convolution, convolution_bias=0 * params.convolution_bias)
    run = jax.jit(lambda params: mamba2.advance(params, x, jnp.ones((BATCH, 11), bool), state, 4)[1].heads)
    # Nothing is read from the data: the state decays.
    mute = lambda params: silent._replace(in_projection=params.in_projection)
    decay = np.exp(-11 * np.exp(params.a_log) * np.log1p(np.exp(params.dt_bias)))
    expected = np.broadcast_to(decay[None, :, None, None], state.heads.shape)
    assert_close(run(mute(still)), expected)
    selective = np.asarray(run(mute(params)))
    assert np.abs(selective[0] - selective[1]).max() > 0.01 * expected.max()
