"""The MLP's activations, initialisers and dropouts: what self-normalizing networks promise, and what others do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import grid, normal

from seqboat.analysis.criticality import critical
from seqboat.layers.feed_forward import FeedForward
from seqboat.layers.initializers import CRITICAL
from seqboat.layers.selu import LOWEST, AlphaDropout
from seqboat.models.mlp import ACTIVATIONS, MLP, MLPConfig

LAYERS, WIDTH, BATCH = 24, 128, 64


def activations(train, **fields):
    """Mean and variance after every hidden layer, of inputs of mean 0 and variance 1.

    Operation by operation: layers of one shape share their programs, and so do the tests.
    """
    model = MLP(MLPConfig(3, (WIDTH,) * LAYERS, **fields))
    x, lengths = normal(0, BATCH, 1, WIDTH), jnp.ones(BATCH, int)

    keys = {"params": jax.random.key(1), "dropout": jax.random.key(1)}
    _, found = model.init_with_output(keys, x, lengths, train, capture_intermediates=True, mutable=True)
    sums = np.stack([found["intermediates"][f"hidden_{i}"]["__call__"][0] for i in range(1, LAYERS)])
    return sums.mean((1, 2)), sums.var((1, 2))


# test_a_feed_forward_network_of_selu, test_alpha_dropout_keeps_mean_and_variance
@pytest.mark.parametrize("dropout", grid((0.0, 0.1)))
def test_selu_keeps_mean_and_variance_through_depth(dropout):
    """Sums of a LeCun layer have the variance of the activations before it plus their squared mean: near 0 and 1."""
    mean, variance = activations(dropout > 0, activation="selu", initializer="lecun", dropout=dropout)
    assert np.abs(mean).max() < 0.15
    assert variance.min() > 0.7
    assert variance.max() < 1.4


@pytest.mark.breadth  # test_initial_values_have_these_variances; tests/analysis/test_depth.py
def test_other_activations_do_not():
    """relu halves it in every layer with LeCun's variance, and keeps it with He's, with which selu's grows."""
    lecun = activations(False, activation="relu", initializer="lecun")[1]
    assert lecun[-1] < 1e-4 * lecun[0]
    he = activations(False, activation="selu", initializer="he")[1]
    assert he[-1] > 2 * he[0]


@pytest.mark.parametrize("rate", grid((0.1, 0.5), 0.1))
def test_alpha_dropout_keeps_mean_and_variance(rate):
    x = normal(0, 400, 500)
    y = AlphaDropout(rate).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert float(y.mean()) == pytest.approx(0, abs=0.01)
    assert float(y.var()) == pytest.approx(1, abs=0.02)
    values, counts = np.unique(np.asarray(y).round(4), return_counts=True)
    value, count = values[counts.argmax()], counts.max()
    scale = ((1 - rate) * (1 + rate * LOWEST**2)) ** -0.5
    assert value == pytest.approx(scale * LOWEST * (1 - rate), abs=1e-4)
    assert count / y.size == pytest.approx(rate, abs=0.01)
    kept = np.abs(np.asarray(y) - value) > 1e-4
    np.testing.assert_allclose(np.asarray(y)[kept], scale * (np.asarray(x)[kept] - rate * LOWEST), atol=1e-5)


@pytest.mark.breadth  # test_alpha_dropout_keeps_mean_and_variance
def test_alpha_dropout_is_nothing_in_evaluation_and_at_rate_0():
    x = normal(0, 3, 4)
    keys = {"dropout": jax.random.key(0)}
    assert (AlphaDropout(0.5).apply({}, x, deterministic=True) == x).all()
    assert (AlphaDropout(0.0).apply({}, x, deterministic=False, rngs=keys) == x).all()
    assert AlphaDropout(0.5).apply({}, x.astype(jnp.bfloat16), deterministic=False, rngs=keys).dtype == jnp.bfloat16
    assert float(nn.selu(jnp.float32(-100.0))) == pytest.approx(LOWEST, abs=1e-6)


@pytest.mark.parametrize("activation", grid(tuple(CRITICAL), "relu", "tanh"))
def test_critical_values_are_those_of_the_analysis(activation):
    found = critical(ACTIVATIONS[activation])
    assert CRITICAL[activation] == pytest.approx((found.weight_variance, found.bias_variance), abs=1e-5)


@pytest.mark.parametrize(
    ("initializer", "activation", "weight", "bias"),
    grid(
        [("he", "tanh", 2, 0), ("lecun", "gelu", 1, 0), ("critical", "gelu", *CRITICAL["gelu"])],
        ("lecun", "gelu", 1, 0),
    ),
)
def test_initial_values_have_these_variances(initializer, activation, weight, bias):
    model = MLP(MLPConfig(2, (400,), activation, initializer))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, 100)), jnp.ones(1, int))["params"]["hidden_0"]
    assert float(params["kernel"].var()) * 100 == pytest.approx(weight, rel=0.05)
    assert float(params["bias"].var()) == pytest.approx(bias, rel=0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "selu", "initializer": "critical"}, "initializer='critical': selu takes 'lecun'"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_named_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        MLPConfig(2, **fields)


def test_a_feed_forward_network_of_selu():
    module, x = FeedForward(256, 0.5, activation="selu"), normal(0, 64, 64)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    up, down = variables["params"]["up"]["kernel"], variables["params"]["down"]["kernel"]
    assert float(up.var()) * 64 == pytest.approx(1, rel=0.1)
    np.testing.assert_allclose(y, nn.selu(x @ up) @ down, atol=1e-5)
    dropped = jax.jit(module.apply)(variables, x, rngs={"dropout": jax.random.key(1)})
    assert float(dropped.var()) == pytest.approx(float(y.var()), rel=0.2)
    assert float(jnp.abs(dropped - y).mean()) > 0.1
