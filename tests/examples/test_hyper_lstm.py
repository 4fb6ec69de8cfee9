"""HyperLSTM beside the LSTM whose rows it scales."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.hyper_lstm import HyperLSTMCell, LayerNormLSTMCell, train

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 7, 4))
CELL = HyperLSTMCell(features=6, hyper_features=5, embedding=2)


def test_every_scale_is_a_tenth_at_the_start_whatever_comes_in():
    params = jax.jit(CELL.init)(KEY, CELL.initialize_carry(KEY, X[:, 0].shape), X[:, 0])["params"]
    for name in ("hidden", "input"):
        z = params[f"{name}_offset"]  # A = 0: the small LSTM has no say yet
        assert not np.any(params[f"{name}_narrow"])
        np.testing.assert_allclose(np.einsum("gn,gnf->gf", z, params[f"{name}_wide"]), 0.1, rtol=1e-6)
    assert not np.any(params["bias_wide"])


def test_with_scales_of_one_it_is_the_layer_norm_lstm_step_by_step():
    hypered, plain = nn.RNN(CELL), nn.RNN(LayerNormLSTMCell(6))
    params = jax.jit(hypered.init)(KEY, X)["params"]["cell"]
    for name in ("hidden", "input"):
        params[f"{name}_wide"] = jnp.full_like(params[f"{name}_wide"], 1 / 2)
    bias = jax.random.normal(KEY, (24,))
    norms = {name: tree for name, tree in params.items() if name.startswith("norm")}
    own = {**norms, "hidden": params["hidden"], "input": {**params["input"], "bias": bias}}
    params["bias"] = bias
    np.testing.assert_allclose(
        jax.jit(hypered.apply)({"params": {"cell": params}}, X),
        jax.jit(plain.apply)({"params": {"cell": own}}, X),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.breadth  # test_with_scales_of_one_it_is_the_layer_norm_lstm_step_by_step
def test_the_small_lstm_changes_the_large_one_as_soon_as_its_scales_move():
    params = jax.jit(nn.RNN(CELL).init)(KEY, X)["params"]
    loss = lambda params: jnp.sum(jnp.sin(nn.RNN(CELL).apply({"params": params}, X)))
    gradient = jax.jit(jax.grad(loss))(params)["cell"]
    assert np.any(gradient["hidden_narrow"])
    assert np.any(gradient["input_narrow"])
    assert not np.any(gradient["hyper"]["input"]["kernel"])  # behind A = 0


@pytest.mark.breadth
def test_the_example_learns():
    losses = jax.jit(lambda key: train(HyperLSTMCell(16), key, steps=60, length=3, batch=16))(KEY)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
