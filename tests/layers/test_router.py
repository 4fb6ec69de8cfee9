"""What decides besides the published router: a rate that is asked for, and fixed patterns of positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, random_like

from seqboat.layers.mixers import ema
from seqboat.layers.router import Decision, FixedPattern, RateControl, RouterConfig, count
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer
from seqboat.models.encoder import Encoder, EncoderConfig

LAYER = LayerConfig(8, 4, 6, mixer=ema.Config(4), window_size=3, causal=True, max_positions=8, block_size=4)
VALID = jnp.ones((1, 512), bool)


def follow(control, scales, offset=0.0):
    """(threshold, activation rate) before and in each batch of normal margins plus offset, times scale."""
    start = control.init(jax.random.key(0))

    def step(variables, inputs):
        scale, offset, key = inputs
        margin = offset * scale + scale * jax.random.normal(key, (*VALID.shape, 2))
        threshold = control.apply(variables)
        one = jnp.ones_like(margin)
        stats = count(Decision(margin > threshold, one, one, jnp.ones(2), margin), VALID)
        stats = jax.tree.map(lambda leaf: leaf[None], stats)  # one layer
        changed = control.apply(variables, stats, method="update", mutable=["batch_stats"])[1]
        return changed, (threshold, stats.active.mean() / VALID.size)

    keys = jax.random.split(jax.random.key(1), len(scales))
    threshold, rate = jax.jit(lambda *inputs: jax.lax.scan(step, start, inputs))(
        scales, jnp.broadcast_to(offset, scales.shape), keys
    )[1]
    return np.asarray(threshold), np.asarray(rate)


# test_a_ceiling_binds_only_above_it: a rate is kept;
# test_the_threshold_is_that_of_previous_batches_and_counts_no_padding: the equation of an exact one.
@pytest.mark.breadth
@pytest.mark.parametrize("target", [0.1, 0.5, 0.75])
def test_an_exact_rate_is_kept_while_the_router_grows_its_margins(target):
    scales = jnp.concatenate([jnp.full(600, 0.1), 10.0 ** jnp.linspace(-1, 3, 2000), jnp.full(400, 1e3)])
    _, rate = follow(RateControl(target, ceiling=False), scales, offset=0.5)
    assert abs(rate[400:600].mean() - target) < 0.01
    assert abs(rate[-200:].mean() - target) < 0.01


def test_a_ceiling_binds_only_above_it():
    threshold, rate = follow(RateControl(0.75), jnp.ones(800))
    assert (threshold == 0).all()
    assert abs(rate.mean() - 0.5) < 0.01
    _, rate = follow(RateControl(0.25), jnp.ones(800))
    assert abs(rate[-200:].mean() - 0.25) < 0.01


@pytest.mark.breadth  # test_a_ceiling_binds_only_above_it
def test_a_rate_that_is_too_low_comes_back_within_a_few_batches():
    # The router closes at once, as one does whose layers lose what they had learned.
    offset = jnp.where(jnp.arange(500) < 300, 0.0, -3.0)
    _, rate = follow(RateControl(0.25, ceiling=False), jnp.ones(500), offset)
    assert abs(rate[250:300].mean() - 0.25) < 0.01
    assert rate[300] < 0.01
    assert abs(rate[350:].mean() - 0.25) < 0.02


def test_the_threshold_is_that_of_previous_batches_and_counts_no_padding():
    router = RouterConfig(target_rate=0.1, rate_control="exact")
    encoder = Encoder(EncoderConfig(dataclasses.replace(LAYER, router=router, form="dense"), 2))
    valid = jnp.arange(9)[None] < jnp.array([9, 5])[:, None]
    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    variables = random_like(jax.eval_shape(encoder.init, jax.random.key(0), x, valid))
    state = {"threshold": 0.1, "squared_margin": 2.0, "batches": 9.0}
    variables["batch_stats"] = {"rate": jax.tree.map(jnp.float32, state)}
    apply = jax.jit(lambda variables, x: encoder.apply(variables, x, valid, True, mutable=["batch_stats", "taps"]))
    (y, stats), changed = apply(variables, x)
    # Other sequences of the batch, later elements and padding change no result.
    other = x.at[1].set(7.0).at[0, 6:].set(3.0)
    (y_other, _), _ = apply(variables, other)
    assert_close(y_other[0, :6], y[0, :6])
    (_, _), padded = apply(variables, x.at[1, 5:].set(100.0))
    assert_close(padded["batch_stats"], changed["batch_stats"])
    # The update is the equation's, over both layers.
    u = np.asarray(changed["taps"]["layers"]["sparse"]["configurator"]["router_logits"], np.float64)
    margin = (u[..., 1] - u[..., 0] + 0.1)[:, np.asarray(valid)]
    square = 2.0 + 0.1 * ((margin**2).mean() - 2.0)
    rate = (margin > 0.1).mean()
    assert 0.1 < rate < 1
    found = changed["batch_stats"]["rate"]
    assert_close(found["squared_margin"], square)
    assert_close(found["threshold"], 0.1 + RateControl.RAISE * np.sqrt(square) * (rate - 0.1))
    assert_close(np.asarray(stats.active).sum() / (2 * 14), rate)
    # In evaluation it stays as it is.
    evaluate = lambda variables: encoder.apply(variables, x, valid, mutable=["batch_stats"])[1]["batch_stats"]
    after = jax.jit(lambda variables: evaluate(variables)["rate"])(variables)
    assert_close({"rate": after}, variables["batch_stats"])


def decide(pattern, rate, start, modules=1, seed=0):
    layer = FixedPattern(modules, pattern, rate)

    @jax.jit
    def run(key, valid, start):
        return layer.init_with_output(key, None, valid, False, None, start)[0].active

    return np.asarray(run(jax.random.key(seed), jnp.ones((2, 10_000), bool), jnp.full((2, 1), start, jnp.uint32)))


STARTS = {"from the start": 0, "across the end of 32 bits": 2**32 - 5000}


@pytest.mark.parametrize("start", grid(STARTS, "across the end of 32 bits"))
def test_patterns_have_their_rate_forever(start):
    strided = decide("strided", 0.3, start)[0, :, 0]
    gaps = np.diff(np.flatnonzero(strided))
    assert set(gaps) == {3, 4}
    assert abs(strided.mean() - 0.3) < 1e-3
    random = decide("random", 0.3, start, modules=2)
    assert (random[0] == random[1]).all()
    assert abs(random[0].mean(0) - 0.3).max() < 0.02
    assert abs((random[0, :, 0] & random[0, :, 1]).mean() - 0.09) < 0.02  # independent
    assert abs((random[0, 1:, 0] & random[0, :-1, 0]).mean() - 0.09) < 0.02
    assert (decide("random", 0.3, start, modules=2, seed=1) != random).any()


def test_a_rate_that_nothing_would_read_is_refused():
    change = lambda **fields: dataclasses.replace(LAYER, **fields)
    for activation in ("learned", "always", "never"):
        with pytest.raises(ValueError, match=r"activation_rate=0.5: only activation='random' and 'strided'"):
            change(activation=activation, activation_rate=0.5)
    for rate in (None, 0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"activation_rate=.*: must be above 0 and at most 1"):
            change(activation="random", activation_rate=rate)
    with pytest.raises(ValueError, match=r"router.target_rate=0.2: activation='always' has no router"):
        change(activation="always", router=RouterConfig(target_rate=0.2))
    for rate in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            RouterConfig(target_rate=rate)
    with pytest.raises(ValueError, match="needs a target_rate"):
        RouterConfig(rate_control="exact")
    alone = SeqBoatLayer(change(router=RouterConfig(target_rate=0.2)))
    with pytest.raises(ValueError, match=r"router.target_rate=0.2: only an Encoder keeps a rate"):
        jax.eval_shape(alone.init, jax.random.key(0), jnp.zeros((1, 4, 8)), jnp.ones((1, 4), bool))
