"""State dicts as people have them: of any precision, from behind wrappers, and with faults that are named briefly."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

from seqboat.interop.published import convert_ema, convert_layer
from seqboat.interop.to_published import layer_state
from seqboat.layers.mixers import ema
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer
from tests.helpers import assert_close, random_like

STATE = {
    **{name: np.asarray(normal(seed, 2, 3, 1)) for seed, name in enumerate(("delta", "alpha", "beta"))},
    "gamma": np.asarray(normal(3, 2, 3)),
    "omega": np.asarray(normal(4, 2)),
}
PLAIN = convert_ema(STATE, 2, 3, True)


def convert(state):
    return convert_ema(state, 2, 3, True)


def named(rename):
    return {rename(name): array for name, array in STATE.items()}


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64", "float8_e4m3fn"])
def test_floating_point_numbers_of_any_kind_are_cast(kind):
    state = {name: array.astype(jnp.dtype(kind)) for name, array in STATE.items()}
    for got, array in zip(jax.tree.leaves(convert(state)), jax.tree.leaves(convert(STATE)), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, array.astype(jnp.dtype(kind)).astype(np.float32))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.model.{name}",
    ],
)
def test_what_wrappers_put_in_front_of_every_name_is_taken_off(rename):
    state = {**named(rename), rename("num_batches_tracked"): np.array(7)}
    jax.tree.map(np.testing.assert_array_equal, convert(state), PLAIN)


def test_a_compiled_part_of_a_model_is_known_by_its_own_name():
    renamed = named(lambda name: f"_orig_mod.{name}" if name == "delta" else name)
    jax.tree.map(np.testing.assert_array_equal, convert(renamed), PLAIN)


def test_another_prefix_is_named():
    with pytest.raises(ValueError, match=r"only a prefix differs: every name begins with 'net\.ema\.'; remove it"):
        convert(named(lambda name: f"net.ema.{name}"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (named(lambda name: f"module.{name}" if name == "delta" else name), "1 missing: delta (2, 3, 1); 1 unexpected"),
        (
            named(lambda name: name.upper()),
            "5 missing: delta (2, 3, 1), alpha (2, 3, 1), beta (2, 3, 1), ...; 5 unexpected: DELTA (2, 3, 1), ALPHA",
        ),
        (STATE | {"omega": np.zeros(3)}, "1 of another shape: omega (3,) instead of (2,)"),
        (STATE | {"omega": np.zeros(2, int)}, "1 not floating point numbers: omega int64"),
        ({}, "5 missing: delta (2, 3, 1), alpha"),
    ],
    ids=["one prefixed", "all other names", "shape", "integers", "empty"],
)
def test_faults_are_counted_and_three_are_named(state, message):
    with pytest.raises(ValueError, match=f"the state dict does not fit the config: {re.escape(message)}") as caught:
        convert(state)
    assert len(str(caught.value)) < 300


def test_a_layer_is_known_behind_wrappers_too():
    config = LayerConfig(4, 2, 4, mixer=ema.Config(2), window_size=2, max_positions=4)
    with pytest.raises(ValueError, match="missing") as caught:
        convert_layer({"module.gamma": np.zeros((2, 2), jnp.bfloat16)}, config)
    assert "unexpected" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": True, "norm": "batch", "position": "rotary"},
        {"norm": "scale", "position": "slot"},
        {"norm": "rms", "position": "t5"},
        {"activation": "always", "position": "none"},
    ],
    ids=str,
)
def test_a_state_dict_made_of_ours_is_read_back(fields):
    config = LayerConfig(4, 2, 6, mixer=ema.Config(3), window_size=2, max_positions=5, **fields)
    x, valid = jnp.zeros((1, 2, 4)), jnp.ones((1, 2), bool)
    variables = random_like(jax.eval_shape(SeqBoatLayer(config).init, jax.random.key(0), x, valid))
    assert_close(convert_layer(layer_state(variables, config), config), jax.tree.map(np.asarray, variables), 0)


def test_the_mean_of_a_centered_router_becomes_part_of_its_bias():
    fields = {"mixer": ema.Config(2), "window_size": 2, "max_positions": 4}
    config = LayerConfig(4, 2, 4, router=RouterConfig(centered=True), **fields)
    x, valid = jnp.zeros((1, 2, 4)), jnp.ones((1, 2), bool)
    variables = random_like(jax.eval_shape(SeqBoatLayer(config).init, jax.random.key(0), x, valid))
    plain = convert_layer(layer_state(variables, config), LayerConfig(4, 2, 4, **fields))
    assert "batch_stats" not in plain
    mean = variables["batch_stats"]["sparse"]["configurator"]["mean"]
    ours, theirs = (tree["params"]["sparse"]["configurator"]["logits"] for tree in (variables, plain))
    m = normal(7, 5, 4)
    logits = (m - mean[None]) @ ours["kernel"] + ours["bias"][None]
    np.testing.assert_allclose(m @ theirs["kernel"] + theirs["bias"][None], logits, atol=1e-6)
    assert np.abs(theirs["bias"] - ours["bias"]).max() > 0.1


def test_leaves_without_a_place_are_named():
    config = LayerConfig(4, 2, 4, mixer=ema.Config(2), window_size=2, max_positions=4)
    with pytest.raises(ValueError, match="the published model needs parameters that this one lacks: params/ssm/delta"):
        layer_state({"params": {"gau": {}}}, config)
    x, valid = jnp.zeros((1, 2, 4)), jnp.ones((1, 2), bool)
    variables = random_like(jax.eval_shape(SeqBoatLayer(config).init, jax.random.key(0), x, valid))
    variables["params"]["more"] = np.ones(3)
    with pytest.raises(ValueError, match="the published model has no place for params/more"):
        layer_state(variables, config)
