"""Signals through depth: closed forms, and a real network against the theory of `analysis.criticality`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal

from seqboat.analysis.criticality import critical, kernel_step, susceptibilities
from seqboat.analysis.depth import growth

gelu = functools.partial(jax.nn.gelu, approximate=False)
WIDTH = 512


def test_a_gain_multiplies_signals_and_differences_of_valid_elements():
    x = normal(0, 2, 5, 4)
    valid = jnp.arange(5)[None] < jnp.array([[5], [2]])
    x = jnp.where(valid[..., None], x, 1e6)
    states = lambda x: [2 * x, jnp.concatenate([6 * x, 6 * x], -1)]
    found = jax.jit(functools.partial(growth, states))(x, valid, jax.random.key(0))
    mean = np.square(np.asarray(x)[np.asarray(valid)]).mean()
    assert_close(found.mean_square, mean * np.array([1, 4, 36]))
    assert_close(found.growth, np.array([4.0, 9.0]), tolerance=1e-3)


@pytest.mark.parametrize(
    ("activation", "kernel", "weight_variance", "bias_variance"),
    grid(
        {
            "gelu": (gelu, 3.562, 1.98306, 0.17292),
            "selu": (jax.nn.selu, 1.0, 1.0, 0.0),
            "relu": (jax.nn.relu, 0.5, 2.0, 0.0),
        },
        "relu",
    ),
)
def test_a_wide_network_grows_as_the_theory_says(activation, kernel, weight_variance, bias_variance):
    """One layer of random weights, its input drawn from the kernel: the mean square of its sums is `kernel_step`, and
    a small difference of inputs grows by chi_perpendicular."""
    weight = normal(0, WIDTH, WIDTH) * np.sqrt(weight_variance / WIDTH)
    bias = normal(1, WIDTH) * np.sqrt(bias_variance)
    z = normal(2, 32, WIDTH) * np.sqrt(kernel)
    states = lambda z: [activation(z) @ weight + bias[None]]
    found = jax.jit(functools.partial(growth, states))(z, jnp.ones(32, bool), jax.random.key(0))
    expected = kernel_step(activation, kernel, weight_variance, bias_variance)
    assert float(found.mean_square[1]) == pytest.approx(expected, rel=0.05)
    assert float(found.growth[0]) == pytest.approx(susceptibilities(activation, kernel, weight_variance)[1], rel=0.05)


@pytest.mark.parametrize(
    ("activation", "kind", "kernel", "weight_variance", "bias_variance"),
    grid(
        {
            "gelu": (gelu, "half-stable", 3.56155, 1.983058, 0.172922),
            "silu": (jax.nn.silu, "half-stable", 14.32017, 1.988005, 0.555143),
            "relu": (jax.nn.relu, "scale-invariant", np.nan, 2.0, 0.0),
            "tanh": (jnp.tanh, "zero", 0.0, 1.0, 0.0),
        },
        "gelu",
        "relu",
        "tanh",
    ),
)
def test_critical_initialisations(activation, kind, kernel, weight_variance, bias_variance):
    found = critical(activation)
    assert found.kind == kind
    assert found[1:] == pytest.approx((kernel, weight_variance, bias_variance), abs=2e-5, nan_ok=True)
    if kind == "half-stable":
        assert kernel_step(activation, *found[1:]) == pytest.approx(found.kernel)
        assert susceptibilities(activation, *found[1:3]) == pytest.approx((1, 1), abs=1e-9)


def test_selu_pulls_norms_to_one_and_spreads_angles():
    """At variance 1 of the weights: K* = 1 is a fixed point, which attracts, and near inputs move apart."""
    assert kernel_step(jax.nn.selu, 1.0, 1.0) == pytest.approx(1, abs=1e-9)
    assert susceptibilities(jax.nn.selu, 1.0, 1.0) == pytest.approx((0.78265, 1.07157), abs=1e-5)


@pytest.mark.parametrize("activation", grid({"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}, "softplus"))
def test_an_activation_without_a_critical_point_is_refused(activation):
    with pytest.raises(ValueError, match="no critical point"):
        critical(activation)
