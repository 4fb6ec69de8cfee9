"""The diagonal linear recurrence: both forms against float64 loops, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, value_and_vjp

from seqboat.ops import recurrence

BATCH, LENGTH, STATES = 3, 13, 4
VALID = jnp.arange(LENGTH)[None] < jnp.asarray([[LENGTH], [7], [0]])


def make(seed, *shape):
    return jax.lax.complex(normal(seed, *shape), normal(seed + 1, *shape))


def make_decay():
    """|a| of 0 to 0.999, among them a state without memory."""
    return jnp.asarray([0, 0.5 * np.exp(2j), 0.9 * np.exp(-1j), 0.999], jnp.complex64)


def loop(decay, input, valid, state, reverse):
    decay, input, h = (np.asarray(a, np.complex128) for a in (decay, input, state))
    out = np.zeros(input.shape, np.complex128)
    for t in range(input.shape[1])[:: -1 if reverse else 1]:
        h = np.where(np.asarray(valid)[:, t, None], decay * h + input[:, t], h)
        out[:, t] = h
    return out, h


def loop_gradients(cotangents, decay, input, valid, state, reverse):
    """The transpose, without conjugates as JAX defines it: the same recurrence, run the other way."""
    steps = range(input.shape[1])[:: -1 if reverse else 1]
    decay = np.asarray(decay, np.complex128)
    h, _ = loop(decay, input, valid, state, reverse)
    d_out, d_h = (np.asarray(a, np.complex128) for a in cotangents)
    d_decay, d_input = np.zeros_like(decay), np.zeros(input.shape, np.complex128)
    for step, t in list(enumerate(steps))[::-1]:
        kept = np.asarray(valid)[:, t, None]
        before = h[:, steps[step - 1]] if step else np.asarray(state, np.complex128)
        d_h = d_h + d_out[:, t]
        d_decay += np.where(kept, d_h * before, 0).sum(0)
        d_input[:, t] = np.where(kept, d_h, 0)
        d_h = np.where(kept, decay * d_h, d_h)
    return d_decay, d_input, d_h


@pytest.mark.parametrize("reverse", grid((False, True), True))
def test_both_forms_equal_loops(reverse):
    decay, input, state = make_decay(), make(0, BATCH, LENGTH, STATES), make(2, BATCH, STATES)
    cotangents = make(4, BATCH, LENGTH, STATES), make(6, BATCH, STATES)

    def both(decay, input, state):
        return [
            recurrence.linear(decay, input, VALID, state, reverse=reverse, method=method)
            for method in ("reference", "associative")
        ]

    # Both forms have the same cotangents, so their gradients add up to twice the one.
    (scan, associative), gradients = value_and_vjp(both)([cotangents, cotangents], decay, input, state)
    expected = loop(decay, input, VALID, state, reverse)
    assert_close(scan, expected)
    assert_close(associative, expected)
    once = loop_gradients(cotangents, decay, input, VALID, state, reverse)
    assert_close(gradients, tuple(2 * gradient for gradient in once))


def test_pieces_of_streams_equal_the_whole():
    """Whatever is in padding; without a state it starts from zeros."""
    decay, input = make_decay(), make(0, BATCH, LENGTH, STATES)
    expected, _ = loop(decay, input, np.ones((BATCH, LENGTH), bool), np.zeros((BATCH, STATES)), False)
    run = jax.jit(recurrence.linear)
    state, done = jnp.zeros((BATCH, STATES), jnp.complex64), np.zeros(BATCH, int)
    for lengths in ([5, 0, 3], [5, 5, 5], [3, 5, 0], [0, 3, 5]):
        where = np.minimum(done[:, None] + np.arange(5)[None], LENGTH - 1)
        piece, valid = np.take_along_axis(np.asarray(input), where[..., None], 1), jnp.arange(5)[None] < np.c_[lengths]
        h, state = run(decay, jnp.where(valid[..., None], piece, 1e9), valid, state)
        for b, n in enumerate(lengths):
            assert_close(h[b, :n], expected[b, done[b] : done[b] + n])
        done += lengths
    assert (done == LENGTH).all()
    assert_close(state, expected[:, -1])
    assert_close(run(decay, input, jnp.ones((BATCH, LENGTH), bool))[0], expected)


def test_an_accelerator_takes_the_form_of_few_steps(monkeypatch):
    assert recurrence.choose("auto") == "reference"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert recurrence.choose("auto") == "associative"
    assert recurrence.choose("reference") == "reference"


@pytest.mark.breadth  # test_both_forms_equal_loops; tests/parity/test_linear_mixers.py: complex states
def test_products_are_complex():
    x, b, c = normal(0, 2, 5, 3), normal(1, 3, 2, STATES), normal(2, 2, STATES, 3)
    h = np.asarray(x, np.complex128) @ (np.asarray(b[:, 0], np.complex128) + 1j * np.asarray(b[:, 1]))
    assert_close(recurrence.into(x, b), h)
    y = (h @ (np.asarray(c[0], np.complex128) + 1j * np.asarray(c[1]))).real
    assert_close(recurrence.out_of(jnp.asarray(h, jnp.complex64), c, x.dtype), y)
