"""Positions: tables, buckets and rotations against plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, assert_close, grid, normal

from seqboat.ops import positions


def test_relative_bias_is_the_entry_of_the_distance_and_clips_at_the_ends():
    longest = 4
    table, query, key = normal(0, 2 * longest - 1), jnp.array([0, 3, 5, 100]), jnp.array([0, 1, 8, 103])
    bias = positions.relative_bias(table, query, key)
    for i, q in enumerate(query.tolist()):
        for j, k in enumerate(key.tolist()):
            assert bias[i, j] == table[longest - 1 + max(-(longest - 1), min(longest - 1, k - q))]
    assert bias[0, 3] == table[-1]
    assert bias[3, 0] == table[0]
    assert bias[2, 2] == bias[3, 3] == table[2 * longest - 2]


@pytest.mark.breadth  # test_window_attention.py: test_equals_its_definition, of slots
def test_slot_bias_starts_at_its_published_offset():
    window = 3
    table, ranks = jnp.arange(6 * window - 1, dtype=jnp.float32), jnp.arange(2 * window)
    bias = np.asarray(positions.slot_bias(table, ranks, ranks, window))
    assert bias[0, 0] == bias[4, 4] == 4 * window - 1
    assert bias[window, 0] == 3 * window - 1
    assert bias[0, window] == 5 * window - 1
    assert bias[2, 1] == bias[1, 0]


def paper_bucket(distance, causal, buckets, furthest=128):
    """Raffel et al. 2020: half of the buckets for single distances, half logarithmically up to 128, the last beyond."""
    offset = 0
    if not causal:
        buckets //= 2
        offset = buckets if distance > 0 else 0
    distance = max(-distance, 0) if causal else abs(distance)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    # The smallest distance of bucket exact + n is exact (128 / exact)^(n / (buckets - exact)).
    boundaries = [exact * (furthest / exact) ** (n / (buckets - exact)) for n in range(buckets - exact)]
    return offset + exact + sum(distance >= boundary * (1 - 1e-9) for boundary in boundaries) - 1


@pytest.mark.parametrize("causal", grid((True, False), True))
@pytest.mark.parametrize("buckets", grid((32, 16), 32))
def test_t5_buckets_are_those_of_the_paper(causal, buckets):
    distances = list(range(-300, 301))
    expected = [paper_bucket(distance, causal, buckets) for distance in distances]
    got = positions.t5_bucket(jnp.array(distances), causal, buckets)
    assert got.tolist() == expected
    assert set(expected) == set(range(buckets)) - (set() if causal else {buckets // 2})


@pytest.mark.breadth  # test_t5_buckets_are_those_of_the_paper
def test_t5_bias_is_one_scalar_a_bucket():
    table, query, key = normal(0, 32), jnp.array([0, 9]), jnp.array([3, 200, 8])
    for causal in (True, False):
        bias = positions.t5_bias(table, query, key, causal)
        for i, j in np.ndindex(2, 3):
            assert bias[i, j] == table[paper_bucket(int(key[j] - query[i]), causal, 32)]


def complex_rotation(x, position):
    """Pairs as complex numbers, times exp(i position 10000^(-2i / Z))."""
    width = x.shape[1]
    pairs = np.asarray(x, np.float64).reshape(len(x), width // 2, 2) @ [1, 1j]
    angles = np.asarray(position)[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    turned = pairs * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def test_rotary_turns_pairs_of_channels():
    x, position = normal(0, 4, 6), jnp.array([0, 1, 7, 300])
    turned, half = jax.jit(lambda x: [positions.rotate(x.astype(t), position) for t in ("float32", "bfloat16")])(x)
    assert_close(turned, complex_rotation(x, position))
    assert_close(turned[0], x[0])
    assert_close(np.square(turned).sum(1), np.square(x).sum(1))
    assert_close(half, complex_rotation(x, position), BF16)


def test_products_of_rotated_rows_depend_on_their_distance_alone():
    q, k = normal(0, 1, 8), normal(1, 1, 8)
    rotate = jax.jit(positions.rotate)
    product = lambda i, j: np.vdot(rotate(q, jnp.array([i])), rotate(k, jnp.array([j])))
    assert_close(product(3, 1), product(60, 58))
    assert_close(product(0, 5), product(40, 45))
    assert abs(product(3, 1) - product(3, 2)) > 1e-2


@pytest.mark.parametrize("start", [10_000_000, 2**31 - 2, -5])
def test_rotation_is_as_exact_at_any_position_and_where_they_wrap_around(start):
    """A float32 angle is off by half a radian at the first of these."""
    x, distance = normal(0, 4, 6), np.array([0, 1, 7, 300], np.int32)
    turned = positions.rotate(x, jnp.int32(start) + distance)
    gram = lambda rows: rows @ rows.T
    assert_close(gram(turned), gram(complex_rotation(x, distance)))
    if 0 < start < 2**31 - 302:
        assert_close(turned, complex_rotation(x, start + distance), 1e-2)  # frequencies are rounded to 2^-33 turns


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoid_is_sine_then_cosine(width):
    table = positions.sinusoid(5, width)
    half = math.ceil(width / 2)
    for t in range(5):
        for channel in range(width):
            frequency = 10000.0 ** (-2 * (channel % half) / width)
            wanted = math.sin(t * frequency) if channel < half else math.cos(t * frequency)
            assert math.isclose(table[t, channel], wanted, abs_tol=1e-6)
    assert table.dtype == np.float32
