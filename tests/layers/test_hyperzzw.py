"""HyperZZW against its equations in float64; the contract of a mixer is tested in test_mixers.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like

from seqboat.layers.mixers import hyperzzw
from seqboat.parallel.rules import SINGLE_DEVICE

LENGTHS, LENGTH, WIDTH = np.array([9, 4, 0]), 9, 3
VALID = np.arange(LENGTH)[None] < LENGTHS[:, None]
CONFIG = hyperzzw.Config(kernel_size=6, slow_width=4, slow_layers=2, frequency=0.3)


def kernel_of(params, size):
    """Lag by lag."""
    lags = []
    for lag in range(size):
        c = -1 + 2 * lag / (size - 1)
        g = np.sin(params["scales"][0] * c)
        for i in range(len(params["hidden"])):
            g = np.sin(params["scales"][i + 1] * c) * (g @ params["hidden"][i] + params["bias"][i])
        lags.append(g @ params["out"] / np.sqrt(size))
    return np.array(lags)


def reference(params, x, size):
    """One sequence without padding."""
    z = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    kernel = kernel_of(params, size)
    y = [sum(kernel[n] * z[n] * z[t - n] for n in range(min(t + 1, size))) for t in range(len(x))]
    return np.array(y).reshape(x.shape)


@pytest.mark.parametrize("causal", grid((True, False), False))
def test_it_is_the_sum_of_its_equations(causal):
    module = CONFIG.make(causal, SINGLE_DEVICE)
    x = jnp.where(VALID[..., None], normal(0, 3, LENGTH, WIDTH), 1e3)
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), x, jnp.asarray(VALID)))
    y = np.asarray(jax.jit(module.apply)(variables, x, jnp.asarray(VALID)))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    for row, length in enumerate(LENGTHS):
        own = np.asarray(x[row, :length], np.float64)
        if causal:
            expected = reference(params, own, CONFIG.kernel_size)
        else:
            past, future = (jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(2))
            size = CONFIG.kernel_size
            expected = reference(past, own, size) + reference(future, own[::-1], size)[::-1]
        assert_close(y[row, :length], expected)


def test_without_context_it_is_a_convolution_with_the_kernel():
    module = dataclasses.replace(CONFIG, context=False).make(True, SINGLE_DEVICE)
    x, valid = normal(0, 1, LENGTH, WIDTH), jnp.ones((1, LENGTH), bool)
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), x, valid))
    kernel = kernel_of(jax.tree.map(np.asarray, variables["params"]), CONFIG.kernel_size)
    z = np.asarray(x[0]) / np.sqrt(np.square(x[0]).mean(-1, keepdims=True) + 1e-6)
    expected = np.stack([np.convolve(z[:, d], kernel[:, d])[:LENGTH] for d in range(WIDTH)], -1)
    assert_close(jax.jit(module.apply)(variables, x, valid), expected[None])


def test_the_sign_of_the_inputs_is_lost():
    """It is quadratic in them, and their size is divided out."""
    module, x, valid = CONFIG.make(True, SINGLE_DEVICE), normal(0, 1, 7, WIDTH), jnp.ones((1, 7), bool)
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), x, valid))
    apply = jax.jit(module.apply)
    assert_close(apply(variables, -50 * x, valid), apply(variables, x, valid))


@pytest.mark.breadth  # test_mixers.py: the battery
def test_how_it_starts():
    config = hyperzzw.Config(slow_width=500)
    x, valid = jnp.zeros((1, 2, WIDTH)), jnp.ones((1, 2), bool)
    params = jax.jit(config.make(True, SINGLE_DEVICE).init)(jax.random.key(0), x, valid)["params"]
    np.testing.assert_allclose(params["scales"].mean(1) / (2 * np.pi * 10), [6, 3, 2], rtol=0.1)
    np.testing.assert_allclose(params["hidden"].var((1, 2)) * 500, [1, 1], rtol=0.05)
    assert (params["bias"] == 1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": 0}, "kernel_size=0: must be at least 1"),
        ({"slow_width": 0}, "slow_width=0: must be at least 1"),
        ({"slow_layers": 0}, "slow_layers=0: must be at least 1"),
        ({"frequency": 0.0}, "frequency=0.0: must be above 0"),
    ],
)
def test_mistakes_are_named_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        hyperzzw.Config(**fields)


def test_streams_are_refused_in_one_line():
    assert hyperzzw.Config().stream_refusal() == (
        "name='hyperzzw' cannot be streamed: an input weights all later ones, so the state would grow"
    )
