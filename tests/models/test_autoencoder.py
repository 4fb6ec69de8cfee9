"""Autoencoders of vectors: quantized latents, their gradients, and their terms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat.layers.terms import collect
from seqboat.models.autoencoder import Autoencoder, AutoencoderConfig, nearest
from tests.helpers import assert_close, normal, random_like

WIDTH, ROWS = 6, 5
SMALL = AutoencoderConfig(width=WIDTH, target_width=None, latents=3, hidden=(8, 4), values=4, commitment=0.5)
INPUTS, LENGTHS = normal(0, ROWS, 1, WIDTH), jnp.ones(ROWS, jnp.int32)


def test_every_latent_takes_the_nearest_of_its_own_values():
    values = jnp.array([[0.0, 1.0, 3.0], [-1.0, 5.0, 6.0]])
    z = jnp.array([[0.4, 5.4], [0.6, -9.0], [2.0, 2.0]])
    # 2 is as far from 1 as from 3, and from -1 as from 5.
    assert nearest(z, values).tolist() == [[0.0, 5.0], [1.0, -1.0], [1.0, -1.0]]


def test_values_learn_from_their_term_and_the_encoder_through_the_quantizer():
    model, plain = Autoencoder(SMALL), Autoencoder(dataclasses.replace(SMALL, quantized=False))
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), INPUTS, LENGTHS))

    @jax.jit
    def both(params):
        def value(params):
            out, changed = model.apply({"params": params}, INPUTS, LENGTHS, True, mutable=["terms"])
            terms = collect(changed["terms"])
            values = [jnp.square(out.logits).sum(), terms["quantization"].scaled, terms["commitment"].scaled]
            return jnp.stack(values), (out, terms)

        _, transpose, aux = jax.vjp(value, params, has_aux=True)
        gradients = jax.lax.map(lambda seed: transpose(seed)[0], jnp.eye(3))  # compiled once
        return *aux, gradients, plain.apply({"params": params}, INPUTS, LENGTHS).latents

    params = variables["params"]
    out, terms, gradients, z = both(params)
    gradient, *of_terms = (jax.tree.map(lambda leaf, i=i: leaf[i], gradients) for i in range(3))
    of_terms = dict(zip(("quantization", "commitment"), of_terms, strict=True))
    values = np.asarray(params["values"])
    assert out.logits.shape == (ROWS, 1, WIDTH)
    assert all(set(column) <= set(own) for column, own in zip(np.asarray(out.latents).T, values, strict=True))
    assert_close(out.latents, nearest(z, params["values"]))
    assert np.abs(out.latents - z).max() > 1e-3
    squares = np.square(np.asarray(out.latents - z))
    for name, coefficient in (("quantization", 0.01), ("commitment", 0.5)):
        assert_close(terms[name].total / terms[name].weight, squares.mean())
        assert_close(terms[name].scaled, coefficient * squares.sum())
    # Of the error no gradient reaches the values, and all of it the encoder.
    assert not gradient["values"].any()
    assert jnp.abs(gradient["encoder_0"]["kernel"]).max() > 0
    moved = lambda name: {path for path, g in of_terms[name].items() if any(map(np.any, jax.tree.leaves(g)))}
    assert moved("quantization") == {"values"}
    assert moved("commitment") == {"encoder_0", "encoder_1", "encoder_out"}
    used = np.asarray(out.latents)[..., None] == values[None]
    expected = 2 * 0.01 * (used * (values[None] - np.asarray(z)[..., None])).sum(0)
    assert_close(of_terms["quantization"]["values"], expected)


def test_targets_may_have_another_width():
    model = Autoencoder(dataclasses.replace(SMALL, target_width=2, quantized=False))
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), INPUTS, LENGTHS)
    assert (output.logits.shape, output.latents.shape) == ((ROWS, 1, 2), (ROWS, 3))
    assert "values" not in variables["params"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": 0}, "latents=0: must be at least 1"),
        ({"width": 0}, "width=0: must be at least 1"),
        ({"values": 1}, "values=1: must be at least 2, as one value tells nothing"),
        ({"hidden": ()}, r"hidden=\(\): must be one or more widths of at least 1"),
        ({"hidden": (4, 0)}, r"hidden=\(4, 0\): must be one or more widths of at least 1"),
        ({"quantization": -1.0}, "quantization=-1.0: must not be negative"),
        ({"commitment": float("nan")}, "commitment=nan: must not be negative"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(SMALL, **changes)
