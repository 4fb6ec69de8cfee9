"""Sliding-window attention over activated elements against loops in float64, its definition."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, assert_close, grid, normal, value_and_vjp

from seqboat.ops.packing import row_info
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend

FUNCTIONS, KINDS = ("softmax", "relu2", "laplace"), ("none", "relative", "slot", "rotary", "t5")
KEY_SIZE, VALUE_SIZE, MAX_POSITIONS = 4, 3, 6

# Four sequences of nine elements: some active, none, one, all.
ACTIVE = np.array([[0, 1, 1, 0, 1, 1, 0, 1, 1], [0] * 9, [0, 0, 0, 1, 0, 0, 0, 0, 0], [1] * 9], bool)
ROWS = ACTIVE.size


def bucket(distance, causal):
    """The published bucketing of 32, for distances below nine."""
    if causal:
        return max(-distance, 0)
    distance, offset = abs(distance), 16 if distance > 0 else 0
    return offset + (distance if distance < 8 else 8)


def rotated(x, position):
    pairs = x.reshape(-1, 2) @ [1, 1j]
    turned = pairs * np.exp(1j * position * 10000.0 ** (-2 * np.arange(len(pairs)) / len(x)))
    return np.stack([turned.real, turned.imag], -1).reshape(-1)


def oracle(window, table, q, k, v, active, weight=None):
    """One sequence after another, one query after another, one key after another. Queries that are inactive give 0."""
    batch, length = active.shape
    shape = lambda x: np.asarray(x, np.float64).reshape(batch, length, -1)
    q, k, v = shape(q), shape(k), shape(v)
    table = None if table is None else np.asarray(table, np.float64)
    weight = np.ones((batch, length)) if weight is None else shape(weight)[..., 0]
    out = np.zeros(v.shape)
    for b in range(batch):
        fifo = np.flatnonzero(active[b])
        for i, t in enumerate(fifo):
            weights, values = [], []
            for j, s in enumerate(fifo):
                if window.causal and j > i:
                    continue
                if window.size is not None and abs(i - j) > window.size:
                    continue
                left, right = q[b, t], k[b, s]
                if window.position == "rotary":
                    left, right = rotated(left, t), rotated(right, s)
                if window.function == "softmax":
                    scale = 1 / math.sqrt(len(left))
                elif window.size is not None:
                    scale = 1 / window.size if window.causal else 1 / (2 * window.size)
                else:
                    scale = 1 / (i + 1) if window.causal else 1 / len(fifo)
                score = scale * left @ right
                if window.position == "relative":
                    score += table[min(max(MAX_POSITIONS - 1 + s - t, 0), 2 * MAX_POSITIONS - 2)]
                elif window.position == "slot":
                    score += table[4 * window.size - 1 + j - i]
                elif window.position == "t5":
                    score += table[bucket(s - t, window.causal)]
                if window.function == "softmax":
                    phi = math.exp(score)
                elif window.function == "relu2":
                    phi = max(score, 0) ** 2
                else:
                    phi = 0.5 * (1 + math.erf((score - 0.707107) / (0.282095 * math.sqrt(2))))
                weights.append(weight[b, s] * phi)
                values.append(v[b, s])
            total = sum(weights) if window.function == "softmax" else 1
            out[b, t] = sum(w * value for w, value in zip(weights, values, strict=True)) / (total or 1)
    return out.reshape(batch * length, -1)


def make_table(window):
    sizes = {"relative": 2 * MAX_POSITIONS - 1, "slot": 6 * (window.size or 0) - 1, "t5": 32}
    size = sizes.get(window.position)
    return None if size is None else normal(4, size) / 2


def inputs():
    return normal(0, ROWS, KEY_SIZE), normal(1, ROWS, KEY_SIZE), normal(2, ROWS, VALUE_SIZE)


def dense(window, table, q, k, v, active=ACTIVE, weight=None, drop=None):
    """`attend` over all rows at once; inactive queries, whose result nobody takes, are put to zero."""
    rows = row_info(jnp.asarray(active))._replace(weight=weight)
    out = attend(window, table, window.apply_rotary(q, rows), window.apply_rotary(k, rows), v, rows, rows, drop)
    return jnp.where(rows.active[:, None], out, 0)


WINDOWS = [
    Window(size, causal, function, kind)
    for function, kind, causal, size in itertools.product(FUNCTIONS, KINDS, (True, False), (2, None))
    if not (kind == "slot" and size is None)
]


def name(window):
    return "-".join(map(str, (window.function, window.position, "causal" if window.causal else "both", window.size)))


# Every kind of position, looking back by two; and of both directions without a size every function, and t5, whose
# buckets depend on the direction.
FAST = [w for w in WINDOWS if w.function == "softmax" and w.causal and w.size == 2]
FAST += [w for w in WINDOWS if w.position == "relative" and not w.causal and w.size is None]
FAST += [Window(None, False, "softmax", "t5")]


@pytest.mark.parametrize("window", grid(WINDOWS, *FAST), ids=name)
def test_equals_its_definition(window):
    table = make_table(window)
    assert_close(dense(window, table, *inputs()), oracle(window, table, *inputs(), ACTIVE))


# Of scores that are cut off, relu2 is the one; that of laplace is in test_equals_its_definition.
fast_function = pytest.mark.parametrize("function", grid(FUNCTIONS, "softmax", "relu2"))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("causal", "size"), grid([(True, 2), (False, None)], (True, 2)))
def test_gradients_are_slopes_of_the_definition(function, causal, size):
    window = Window(size, causal, function, "relative")
    arguments, cotangent = (make_table(window), *inputs()), normal(5, ROWS, VALUE_SIZE)
    _, gradients = value_and_vjp(functools.partial(dense, window))(cotangent, *arguments)
    exact = [np.asarray(x, np.float64) for x in arguments]
    for i, gradient in enumerate(gradients):
        direction = np.asarray(normal(6 + i, *exact[i].shape), np.float64)

        def along(step, i=i, direction=direction):
            moved = [x + step * direction if i == j else x for j, x in enumerate(exact)]
            return np.vdot(cotangent, oracle(window, *moved, ACTIVE))

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        assert_close(np.vdot(gradient, direction), np.float64(slope))


@fast_function
@pytest.mark.parametrize("value", grid((1e6, -1e6), 1e6), ids=str)
def test_masked_keys_leak_nothing(function, value):
    """Whatever an inactive row holds as key and value, outputs and gradients are the same."""
    window = Window(2, False, function, "relative")
    flat = ACTIVE.reshape(-1, 1)
    table, (q, k, v), cotangent = make_table(window), inputs(), normal(5, ROWS, VALUE_SIZE)
    run = value_and_vjp(lambda table, q, k, v: dense(window, table, q, k, v))
    clean = run(cotangent, table, q, jnp.where(flat, k, 0), jnp.where(flat, v, 0))
    assert_close(run(cotangent, table, q, jnp.where(flat, k, value), jnp.where(flat, v, value)), clean)


@fast_function
def test_keys_outside_the_window_and_of_other_sequences_leak_nothing(function):
    """Values and gradients of one query with respect to every key: zero where it does not see."""
    window = Window(2, True, function, "relative")
    table, (q, k, v) = make_table(window), inputs()
    table = table + 3  # nothing is cut off by relu2
    query = 3 * 9 + 6  # element 6 of the sequence that is wholly active: it sees 4, 5 and itself
    seen = [query - 2, query - 1, query]
    d_k, d_v = jax.jit(jax.grad(lambda k, v: dense(window, table, q, k, v)[query].sum(), argnums=(0, 1)))(k, v)
    assert np.flatnonzero(np.abs(d_k).max(1)).tolist() == seen
    assert np.flatnonzero(np.abs(d_v).max(1)).tolist() == seen


@fast_function
def test_rows_that_see_nothing_give_zero_and_finite_gradients(function):
    window = Window(2, True, function, "relative")
    nothing = np.zeros((2, 4), bool)
    table, cotangent = make_table(window), normal(5, 8, VALUE_SIZE)
    q, k, v = (x[:8] for x in inputs())
    rows = row_info(jnp.asarray(nothing))
    run = value_and_vjp(lambda *args: attend(window, *args, rows, rows))
    out, gradients = run(cotangent, table, q, k, v)
    assert not np.asarray(out).any()
    for gradient in gradients:
        assert not np.asarray(gradient).any()


@fast_function
def test_key_weights_multiply_what_keys_contribute(function):
    window = Window(2, False, function, "relative")
    table, weight = make_table(window), jnp.abs(normal(7, ROWS)) + 0.1
    got = dense(window, table, *inputs(), weight=weight)
    assert_close(got, oracle(window, table, *inputs(), ACTIVE, weight))
    assert_close(dense(window, table, *inputs(), weight=jnp.ones(ROWS)), dense(window, table, *inputs()))
    assert not np.asarray(dense(window, table, *inputs(), weight=jnp.zeros(ROWS))).any()


def test_dropped_weights_do_not_change_the_normaliser():
    """Dropout falls on weights that are normalised already, as in the published layer."""
    window = Window(None, False, "softmax", "none")
    q, k, v = inputs()
    drop = jnp.where(normal(8, ROWS, ROWS) > 0, 2.0, 0.0)
    got = dense(window, None, q, k, v, drop=drop)
    probability = dense(window, None, q, k, jnp.eye(ROWS))
    assert_close(got, (probability * drop) @ v)
    assert_close(dense(window, None, q, k, v, drop=jnp.ones((ROWS, ROWS))), dense(window, None, q, k, v))


def test_large_scores_do_not_overflow_softmax():
    window = Window(2, False, "softmax", "none")
    q, k, v = inputs()
    q, k = 100 * jnp.round(q), jnp.round(k)  # scores of some hundreds, exact in float32
    assert_close(dense(window, None, q, k, v), oracle(window, None, q, k, v, ACTIVE))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision(function):
    window = Window(2, True, function, "relative")
    table, half = make_table(window), [x.astype(jnp.bfloat16) for x in inputs()]
    got = dense(window, table, *half)
    assert got.dtype == jnp.bfloat16
    assert_close(got, oracle(window, table, *half, ACTIVE), BF16)


@pytest.mark.breadth  # test_equals_its_definition: nine elements
@pytest.mark.parametrize("length", grid((1, 7, 63), 63))
def test_odd_lengths(length):
    active = normal(9, 2, length) > -0.5
    q, k, v = (normal(i, 2 * length, size) for i, size in enumerate((KEY_SIZE, KEY_SIZE, VALUE_SIZE)))
    window = Window(3, True, "softmax", "rotary")
    assert_close(dense(window, None, q, k, v, active), oracle(window, None, q, k, v, np.asarray(active)))


def test_halo_reaches_no_further_than_the_sequence():
    assert Window(3, True, "softmax", "none").halo(100) == (3, 0)
    assert Window(3, False, "softmax", "none").halo(100) == (3, 3)
    assert Window(300, False, "softmax", "none").halo(100) == (99, 99)
    assert Window(None, True, "softmax", "none").halo(100) == (99, 0)
    assert Window(3, True, "softmax", "none").halo(1) == (0, 0)


@pytest.mark.parametrize("score", grid((0.0, 5.0, 200.0), 200.0))
def test_the_gradient_of_a_weight_of_zero_is_that_of_the_step_to_one(score):
    """One query, a key of weight 1 and one of weight 0 with a score so much higher; finite however high it is."""
    window = Window(None, False, "softmax", "none")
    rows = row_info(jnp.ones((1, 2), bool))
    q, k = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [score]])
    v, cotangent = jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [0.0]])

    def out(weight):
        return jnp.vdot(attend(window, None, q, k, v, rows, rows._replace(weight=weight)), cotangent)

    run = jax.jit(jax.value_and_grad(out))
    value, gradient = run(jnp.array([1.0, 0.0]))
    step = run(jnp.ones(2))[0] - value
    np.testing.assert_allclose(gradient[1], step, rtol=1e-5)
