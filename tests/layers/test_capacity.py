"""The router's rule "capacity": how many are active in training, and causal decisions in evaluation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like

from seqboat.layers import capacity, config, transformer
from seqboat.layers.mixers import ema
from seqboat.layers.router import RouterConfig
from seqboat.layers.terms import collect

D, BATCH, LENGTH = 8, 4, 12
VALID = jnp.arange(LENGTH)[None] < jnp.array([0, 1, 7, LENGTH])[:, None]
X = normal(1, BATCH, LENGTH, D)
MOD = RouterConfig(rule="capacity", capacity=0.3)
LAYERS = {
    "seqboat": config.LayerConfig(
        D, 4, 6, 3, causal=True, mixer=ema.Config(2), max_positions=8, form="dense", router=MOD
    ),
    "transformer": transformer.LayerConfig(D, 2, causal=True, activation="learned", form="dense", router=MOD),
}


@pytest.mark.parametrize("share", grid((0.1, 0.125, 0.3, 1.0), 0.1, 0.3))
def test_ceil_of_the_share_of_valid_elements_is_active_and_they_have_the_largest_margins(share):
    margin = normal(2, BATCH, LENGTH, 2).at[3, 4:6].set(9.0)
    active = np.asarray(capacity.largest(margin, VALID, share))
    for row, n in enumerate((0, 1, 7, LENGTH)):
        for module in range(2):
            on = active[row, :, module]
            assert on.sum() == math.ceil(share * n)
            assert not on[n:].any()
            rest = np.asarray(margin)[row, :n, module][~on[:n]]
            assert not on.any() or not rest.size or np.asarray(margin)[row, on, module].min() >= rest.max()
    assert capacity.largest(jnp.ones((1, 30, 1)), jnp.ones((1, 30), bool), 0.1).sum() == 3, "0.1 of 30 is 3"


@functools.cache
def compiled(name, train, share=0.3):
    """(params, x) -> (y, taps, terms); parameters whose margins have both signs."""
    config = dataclasses.replace(LAYERS[name], router=dataclasses.replace(MOD, capacity=share))
    layer = config.block()(config)

    @jax.jit
    def run(params, x):
        (y, _), sown = layer.apply({"params": params}, x, VALID, train, mutable=["taps", "terms"])
        return y, sown["taps"], collect(sown.get("terms", {}))

    params = random_like(jax.eval_shape(layer.init, jax.random.key(0), X, VALID)["params"])
    logits = run(params, X)[1]["sparse"]["configurator"]["router_logits"][VALID][:, 0]
    bias = params["sparse"]["configurator"]["logits"]["bias"]
    middle = jnp.median(logits[:, 1] - logits[:, 0])
    params["sparse"]["configurator"]["logits"]["bias"] = bias.at[1].add(-middle)
    return run, params


def changed_later(name, train):
    """What `active` was and is, (B, L), of earlier elements and all outputs there, when later inputs change."""
    run, params = compiled(name, train)
    late = (jnp.arange(LENGTH) >= 6)[None, :, None]
    results = [run(params, x) for x in (X, jnp.where(late, 5 * normal(3, BATCH, LENGTH, D), X))]
    return [(np.asarray(taps["sparse"]["active"])[:, :6, 0], y[:, :6]) for y, taps, _ in results]


@pytest.mark.parametrize("name", grid(tuple(LAYERS), "transformer"))
def test_evaluation_does_not_look_ahead_and_training_does(name):
    (before, y), (after, other) = changed_later(name, False)
    np.testing.assert_array_equal(before, after)
    assert 0 < before.sum() < np.asarray(VALID)[:, :6].sum()
    assert_close(other, y)
    (before, _), (after, _) = changed_later(name, True)
    assert (before[3] != after[3]).any(), "a later element takes the place of an earlier one"


@pytest.mark.parametrize("name", grid(tuple(LAYERS), "transformer"))
def test_the_margin_decides_in_evaluation_and_its_sigmoid_is_the_confidence(name):
    run, params = compiled(name, False)
    _, taps, terms = run(params, X)
    logits = np.asarray(taps["sparse"]["configurator"]["router_logits"], np.float64)[:, :, 0]
    margin = logits[..., 1] - logits[..., 0]
    np.testing.assert_array_equal(taps["sparse"]["active"][..., 0], (margin > 0) & VALID)
    assert_close(taps["sparse"]["confidence"][..., 0], 1 / (1 + np.exp(-margin)))
    assert not terms, "evaluation has no term"
    assert "log_temperature" not in params["sparse"]["configurator"]


@pytest.mark.parametrize("name", grid(tuple(LAYERS), "transformer"))
def test_training_activates_the_share_and_states_the_cross_entropy(name):
    run, params = compiled(name, True)
    _, taps, terms = run(params, X)
    active = np.asarray(taps["sparse"]["active"])[..., 0]
    np.testing.assert_array_equal(active.sum(1), [0, 1, 3, 4])
    p = np.asarray(taps["sparse"]["confidence"], np.float64)[..., 0]
    loss = -np.where(active, np.log(p), np.log(1 - p))[np.asarray(VALID)]
    assert_close(terms["capacity"].total, np.float32(loss.sum()))
    assert_close(terms["capacity"].scaled, np.float32(0.01 * loss.sum()))
    assert terms["capacity"].weight == 20


@pytest.mark.breadth  # test_ceil_of_the_share_of_valid_elements_is_active_and_they_have_the_largest_margins
def test_a_capacity_of_one_is_always_with_confidence():
    run, params = compiled("transformer", True, 1.0)
    y, taps, _ = run(params, X)
    always = dataclasses.replace(LAYERS["transformer"], activation="always", router=RouterConfig())
    other, _ = jax.jit(transformer.TransformerLayer(always).apply)({"params": {"unit": params["unit"]}}, X, VALID)
    np.testing.assert_array_equal(taps["sparse"]["active"][..., 0], VALID)
    assert_close(y, X + taps["sparse"]["confidence"] * (other - X))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "capacity", "capacity": 0.0}, "capacity=0.0: must be above 0 and at most 1"),
        ({"rule": "capacity", "capacity": 2.0}, "capacity=2.0: must be above 0 and at most 1"),
        ({"capacity": 0.5}, "capacity=0.5: only rule='capacity' has one, and this is rule='margin'"),
        ({"capacity_loss": 0.5}, "capacity_loss=0.5: only rule='capacity' has one"),
        ({"rule": "capacity", "capacity_loss": -1.0}, "capacity_loss=-1.0: must not be negative"),
        ({"rule": "capacity", "target_rate": 0.3}, "target_rate=0.3: only rule='margin' has one"),
        ({"rule": "capacity", "temperature_scale": 0.3}, "temperature_scale=0.3: only rule='margin' has one"),
    ],
)
def test_what_the_rule_does_not_read_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**fields)


@pytest.mark.parametrize("activation", ["always", "never"])
def test_without_a_router_there_is_no_rule(activation):
    with pytest.raises(ValueError, match=f"router.rule='capacity': activation='{activation}' has no router"):
        dataclasses.replace(LAYERS["seqboat"], activation=activation)
