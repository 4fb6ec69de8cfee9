"""Recurrent cells: values against their equations in float64, gradients against those of a loop over the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal

from seqboat.ops import cells

COPIES, BATCH, LENGTH, WIDTH = 2, 2, 6, 3
# Elements that are not valid at the start, inside, and at the end.
VALID = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0]], bool)


def sigmoid(xp, a):
    return 1 / (1 + xp.exp(-a))


def elman_step(xp, recurrent, z, state):
    return (xp.tanh(z + state[-1] @ recurrent),)


def jordan_step(xp, params, z, state):
    return (xp.tanh(z + state[-1] @ params.recurrent) @ params.output + params.output_bias[None],)


def lstm_step(xp, params, z, state):
    c, h = state
    i, f, g, o = xp.split(z + h @ params.recurrent, 4, axis=1)
    p = xp.zeros((3, 1, WIDTH)) if params.peepholes is None else params.peepholes[:, None]
    c_next = sigmoid(xp, f + p[1] * c) * c + sigmoid(xp, i + p[0] * c) * xp.tanh(g)
    return c_next, sigmoid(xp, o + p[2] * c_next) * xp.tanh(c_next)


def gru_step(xp, params, z, state):
    (h,) = state
    (z_r, z_u, z_n), (h_r, h_u, h_n) = xp.split(z, 3, axis=1), xp.split(h @ params.recurrent, 3, axis=1)
    u = sigmoid(xp, z_u + h_u)
    n = xp.tanh(z_n + sigmoid(xp, z_r + h_r) * (h_n + params.recurrent_bias[None]))
    return ((1 - u) * n + u * h,)


def weights(*shape, seed=1):
    return normal(seed, *shape) / 2


# The cell, the step of its equations, its parameters, the width of z, the number of arrays of its state.
CELLS = {
    "elman": (cells.elman, elman_step, weights(WIDTH, WIDTH), 1, 1),
    "jordan": (
        cells.jordan,
        jordan_step,
        cells.JordanParams(weights(WIDTH, WIDTH), weights(WIDTH, WIDTH, seed=2), weights(WIDTH)),
        1,
        1,
    ),
    "lstm": (cells.lstm, lstm_step, cells.LSTMParams(weights(WIDTH, 4 * WIDTH)), 4, 2),
    "lstm with peepholes": (
        cells.lstm,
        lstm_step,
        cells.LSTMParams(weights(WIDTH, 4 * WIDTH), weights(3, WIDTH, seed=2)),
        4,
        2,
    ),
    "gru": (cells.gru, gru_step, cells.GRUParams(weights(WIDTH, 3 * WIDTH), weights(WIDTH)), 3, 1),
}


def loop(step, params, z, state, reverse):
    """y (B, L, D) and the last state in numpy, element by element."""
    y = [None] * LENGTH
    for t in reversed(range(LENGTH)) if reverse else range(LENGTH):
        after = step(np, params, z[:, t], state)
        state = tuple(np.where(VALID[:, t, None], new, old) for new, old in zip(after, state, strict=True))
        y[t] = state[-1]
    return np.stack(y, 1), state


def scan(step, params, z, state, reverse):
    """The same, with a gradient."""

    def element(state, inputs):
        z, valid = inputs
        after = step(jnp, params, z, state)
        state = tuple(jnp.where(valid[:, None], new, old) for new, old in zip(after, state, strict=True))
        return state, state[-1]

    state, y = jax.lax.scan(element, state, (z.swapaxes(0, 1), VALID.T), reverse=reverse)
    return y.swapaxes(0, 1), state


def inputs(name, dtype=np.float32):
    _, _, params, gates, states = CELLS[name]
    z = normal(3, COPIES, BATCH, LENGTH, gates * WIDTH)
    state = tuple(normal(4 + i, COPIES, BATCH, WIDTH) / 2 for i in range(states))
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), (params, z, state))


# tests/parity/test_wide.py: the others
@pytest.mark.parametrize("name", grid(tuple(CELLS), "jordan", "lstm with peepholes"))
def test_values_and_gradients_are_those_of_the_equations(name):
    """Also under vmap: the copies are two batches with the same parameters."""
    cell, step = CELLS[name][:2]

    def ours(params, z, state, reverse):
        def one(z, state):
            y, after = cell(params, z, jnp.asarray(VALID), state if len(state) > 1 else state[0], reverse)
            return y, after if len(state) > 1 else (after,)

        return jax.vmap(one)(z, state)

    def equations(params, z, state, reverse):
        return jax.vmap(lambda z, state: scan(step, params, z, state, reverse))(z, state)

    params, z, state = inputs(name)
    exact = inputs(name, np.float64)
    copies = [
        [loop(step, exact[0], exact[1][i], tuple(leaf[i] for leaf in exact[2]), reverse) for i in range(COPIES)]
        for reverse in (False, True)
    ]
    expected = [jax.tree.map(lambda *leaves: np.stack(leaves), *pair) for pair in copies]
    cotangent = jax.tree.map(lambda leaf: normal(9, *leaf.shape), expected)

    @jax.jit
    def run(params, z, state):
        results = []
        for form in (ours, equations):
            value, transpose = jax.vjp(lambda *a, form=form: [form(*a, r) for r in (False, True)], params, z, state)
            results.append((value, transpose(cotangent)))
        return results

    (value, gradient), (_, expected_gradient) = run(params, z, state)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", grid(tuple(CELLS), "jordan", "lstm with peepholes"))
def test_states_are_float32_and_outputs_of_the_dtype_of_z(name):
    cell, _, params, gates, states = CELLS[name]
    state = tuple(jnp.zeros((BATCH, WIDTH)) for _ in range(states))
    z = jnp.zeros((BATCH, LENGTH, gates * WIDTH), jnp.bfloat16)
    run = functools.partial(cell, params, valid=jnp.asarray(VALID), state=state if states > 1 else state[0])
    y, after = jax.eval_shape(lambda z: run(z), z)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    # Gradients have the dtypes of what they are for.
    scalar = lambda params, z: cell(params, z, run.keywords["valid"], run.keywords["state"])[0].astype(float).sum()
    gradients = jax.eval_shape(jax.grad(scalar, (0, 1)), params, z)
    assert jax.tree.map(lambda leaf: leaf.dtype, gradients) == jax.tree.map(lambda leaf: leaf.dtype, (params, z))
