"""Codes of hyper-inputs: norms, inner products, ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat.hyper.encoding import Encoding
from tests.helpers import grid


def inputs(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(count, width))


def codes(encoding: Encoding, z: np.ndarray) -> np.ndarray:
    return np.asarray(jax.vmap(encoding)(jnp.asarray(z)))


@pytest.mark.parametrize("width", grid((1, 2, 8), 2))
def test_the_norm_of_cos_sin_codes_is_constant(width):
    with jax.enable_x64(True):
        found = codes(Encoding(inputs=width), inputs(50, width))
    np.testing.assert_allclose(np.square(found).sum(1), width, rtol=1e-12)
    assert found.shape == (50, 2 * width)


def test_inner_products_depend_on_differences_alone():
    z = inputs(20, 3)
    with jax.enable_x64(True):
        found = codes(Encoding(inputs=3), z)
    wanted = np.cos(np.pi / 2 * (z[:, None] - z[None])).sum(-1)
    np.testing.assert_allclose(found @ found.T, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.breadth  # test_inner_products_depend_on_differences_alone
def test_the_ends_are_orthogonal():
    with jax.enable_x64(True):
        low, high = codes(Encoding(), np.array([[0.0], [1.0]]))
    assert abs(low @ high) < 1e-12


@pytest.mark.parametrize("kind", ["none", "cos_sin", "complement", "fourier", "l2"])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_energy_is_the_expected_squared_norm(kind, unit_norm):
    encoding = Encoding(kind, inputs=3, size=4, unit_norm=unit_norm)
    found = codes(encoding, inputs(20_000, 3))
    assert found.shape[1] == encoding.width
    np.testing.assert_allclose(np.square(found).sum(1).mean(), encoding.energy, rtol=0.02)


def test_complement_has_a_constant_sum_and_l2_a_constant_norm():
    np.testing.assert_allclose(codes(Encoding("complement", inputs=3), inputs(9, 3)).sum(1), 3, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(codes(Encoding("l2", inputs=3), inputs(9, 3)), axis=1), 1, rtol=1e-6)


def test_another_range_is_brought_to_that_of_0_to_1():
    z = inputs(5, 2)
    np.testing.assert_allclose(
        codes(Encoding(inputs=2, low=-3.0, high=5.0), 8 * z - 3), codes(Encoding(inputs=2), z), atol=1e-6
    )


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_a_value_out_of_range_is_an_error_outside_jit_and_nan_inside(value):
    encoding = Encoding()
    with pytest.raises(ValueError, match=r"outside its range 0\.0\.\.1\.0"):
        encoding.check(jnp.array([value]))
    assert np.isnan(jax.jit(encoding)(jnp.array([value]))).all()


def test_tasks_are_looked_up_and_unknown_ones_refused():
    encoding, table = Encoding("embedding", tasks=3, size=2), jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(encoding(jnp.array([2]), table), [4, 5])
    with pytest.raises(ValueError, match="outside its range"):
        encoding.check(jnp.array([3]))
    assert np.isnan(jax.jit(encoding)(jnp.array([3]), table)).all()


@pytest.mark.parametrize("task", [-1.0, 0.5, 1.5, 3.0, np.nan])
def test_a_task_that_is_not_there_is_nan_inside_jit(task):
    encoding, table = Encoding("embedding", tasks=3, size=2), jnp.arange(6.0).reshape(3, 2)
    assert np.isnan(jax.jit(encoding)(jnp.array([task]), table)).all()
    with pytest.raises(ValueError, match="hyper-input"):
        encoding.check(np.array([task]))


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\): its last axis must have 2"):
        Encoding(inputs=2).check(jnp.zeros(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": 0}, "at least 1"),
        ({"low": 1.0}, "below"),
        ({"kind": "embedding"}, "at least 1 task"),
        ({"kind": "l2"}, "use cos_sin"),
    ],
)
def test_impossible_encodings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Encoding(**fields)
