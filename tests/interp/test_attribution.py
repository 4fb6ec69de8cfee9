"""Router decisions taken apart: the terms sum to the model's margin, and features taken away flip what they should."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like, rms

from seqboat.interp import attribution
from seqboat.interp.edits import Without
from seqboat.layers.mixers import ema, lstm, s4d
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer

BATCH, LENGTH, LENGTHS, D, FEATURES = 2, 11, (11, 7), 8, 12
REAL = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
CAUSAL = LayerConfig(D, 4, 6, mixer=ema.Config(2), causal=True, attention=False, feed_forward_size=4)
CENTRED = RouterConfig(centered=True)
CONFIGS = {
    "ema, causal, centred": dataclasses.replace(CAUSAL, router=CENTRED),
    "ema, both directions, truncated": dataclasses.replace(CAUSAL, causal=False, mixer=ema.Config(2, truncation=3)),
    "s4d, both directions, two modules": dataclasses.replace(CAUSAL, causal=False, mixer=s4d.Config(2), attention=True),
    "s4d, causal, truncated": dataclasses.replace(CAUSAL, mixer=s4d.Config(2, truncation=4)),
}


class Atoms(flax.struct.PyTreeNode):
    """A dictionary with a threshold of zero, as `seqboat.interp.dictionaries.Atoms`."""

    encoder: jax.Array
    bias: jax.Array
    decoder: jax.Array
    centre: jax.Array
    offset: jax.Array

    def encode(self, x):
        lead = (None,) * (x.ndim - 1)
        return jax.nn.relu((x - self.centre[lead]) @ self.encoder + self.bias[lead])

    def decode(self, f):
        return f @ self.decoder + self.offset[(None,) * (f.ndim - 1)]


ATOMS = Atoms(normal(1, D, FEATURES), normal(2, FEATURES), normal(3, FEATURES, D), normal(4, D), normal(5, D))


@functools.cache
def case(name):
    """A layer's config, its variables, and (edits) -> its taps."""
    layer, x = SeqBoatLayer(CONFIGS[name]), normal(0, BATCH, LENGTH, D)
    variables = random_like(jax.eval_shape(layer.init, jax.random.key(0), x, jnp.asarray(REAL)))
    apply = lambda edits: layer.apply({**variables, **edits}, x, jnp.asarray(REAL), mutable=["taps"])[1]["taps"]
    return CONFIGS[name], variables, jax.jit(apply)


def router_of(variables, module=0):
    """As of the second layer of a model."""
    other = jax.tree.map(lambda leaf: jnp.stack([jnp.full_like(leaf, jnp.nan), leaf]), variables)
    model = {name: {"encoder": {"layers": tree}} for name, tree in other.items()}
    return attribution.router(model, 2, module)


def margins_of(taps, module=0):
    logits = np.asarray(taps["sparse"]["configurator"]["router_logits"], np.float64)[:, :, module]
    return logits[..., 1] - logits[..., 0]


@pytest.mark.parametrize("name", grid(list(CONFIGS), "ema, causal, centred"))
def test_the_terms_sum_to_the_margin_of_every_element(name):
    config, variables, apply = case(name)
    taps = apply({})
    kernel, direct = config.mixer.kernel(variables["params"]["ssm"], LENGTH)

    @jax.jit
    def run(router, taps):
        """Margins by feature and by channel, and the terms by source (B, L, L)."""
        # Padding enters the mixer as zeros.
        x = jnp.where(REAL[..., None], taps["pre_norm"], 0)
        terms = lambda e, x, t: attribution.margin_by_source(kernel, direct, router.weight, e, x, t)
        by_source = jax.vmap(jax.vmap(terms, (None, None, 0)), (0, 0, None))(taps["ssm_out"], x, jnp.arange(LENGTH))
        channels = attribution.margin_by_channel(router, taps["m"]).sum(-1) + router.bias
        return attribution.margin_by_feature(ATOMS, router, taps["m"]).margin, channels, by_source

    for module in range(len(config.make_modules())):
        router, margin = router_of(variables, module), margins_of(taps, module)
        tolerance = 1e-4 * rms(margin[REAL])
        features, channels, sources = map(np.asarray, run(router, taps))
        for found in (features, channels):
            np.testing.assert_allclose(found, margin, atol=tolerance, rtol=0)
        np.testing.assert_allclose((sources.sum(-1) + router.constant)[REAL], margin[REAL], atol=tolerance, rtol=0)
        ahead = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
        assert np.abs(sources[:, ~ahead]).max() > tolerance
        assert (np.abs(sources[:, ahead]).max() == 0) == config.causal


def test_predicted_flips_are_those_of_taking_the_feature_away():
    _, variables, apply = case("ema, causal, centred")
    taps = apply({})
    terms = jax.jit(functools.partial(attribution.margin_by_feature, ATOMS))(router_of(variables), taps["m"])
    taken = np.stack(
        [margins_of(apply({"edits": {"m": Without(True, ATOMS, jnp.array(i))}})) for i in range(FEATURES)], -1
    )
    margin = margins_of(taps)
    assert_close(taken, margin[..., None] - np.asarray(terms.features), 1e-4)
    sure = REAL & (np.abs(margin) > 1e-4)
    certain = sure[..., None] & (np.abs(taken) > 1e-4)
    measured = (taken > 0) != (margin > 0)[..., None]
    np.testing.assert_array_equal(np.asarray(terms.flips())[certain], measured[certain])
    assert certain[sure].mean() > 0.99
    assert 0 < measured[certain].mean() < 1


def test_the_threshold_of_a_rate_is_part_of_the_bias():
    logits = {"kernel": normal(0, 1, D, 2), "bias": normal(1, 1, 2)}
    params = {"params": {"encoder": {"layers": {"sparse": {"configurator": {"logits": logits}}}}}}
    rate = {"batch_stats": {"encoder": {"rate": {"threshold": 0.25}}}}
    plain, held = attribution.router(params, 1), attribution.router({**params, **rate}, 1)
    assert_close(held.bias, plain.bias - 0.25)
    with pytest.raises(ValueError, match="have no router: nothing is decided"):
        attribution.router({"params": {"encoder": {"layers": {}}}}, 1)


def test_a_mixer_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="mixer lstm: its output is not a sum over earlier elements"):
        lstm.Config().kernel({}, LENGTH)


def test_a_feature_of_gated_values_by_source():
    encoder, gate, weights, v = normal(0, 5), normal(1, 5), jax.nn.softmax(normal(2, LENGTH)), normal(3, LENGTH, 5)
    terms = np.asarray(jax.jit(attribution.feature_by_source)(encoder, gate, weights, v))
    encoder, gate, weights, v = (np.asarray(array, np.float64) for array in (encoder, gate, weights, v))
    assert_close(terms.sum(), ((weights @ v) * gate) @ encoder)
    assert_close(terms[3], weights[3] * (encoder * gate) @ v[3])
