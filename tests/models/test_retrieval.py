"""The model of pairs of documents: what it computes from two encodings, and what it must not depend on."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_like, rms

from seqboat.layers.mixers import ema
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.encoder import Encoder, EncoderConfig
from seqboat.models.retrieval import DualEncoder, RetrievalConfig

D, LAYERS, VOCABULARY, CLASSES, HEAD = 8, 2, 5, 3, 6
BATCH, LENGTH = 3, 9
LENGTHS = jnp.array([[9, 4], [1, 7], [0, 3]])
LAYER = LayerConfig(D, 4, 6, mixer=ema.Config(4), window_size=3, causal=False, max_positions=16, block_size=4)
# The dense form compiles sooner, and nothing here depends on the form.
ENCODER = EncoderConfig(dataclasses.replace(LAYER, form="dense"), LAYERS, remat="none")
CONFIG = RetrievalConfig(ENCODER, CLASSES, VOCABULARY, head_size=HEAD)
MODEL = DualEncoder(CONFIG)
PADDING = jnp.asarray(np.arange(LENGTH)[None, :, None] >= np.asarray(LENGTHS)[:, None])


def pairs(seed: int = 0, length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(VOCABULARY, size=(BATCH, length, 2)))


def shapes(model: DualEncoder):
    return jax.eval_shape(model.init, jax.random.key(0), pairs(), LENGTHS)


@functools.cache
def variables():
    return random_like(shapes(MODEL))


apply, encoder = jax.jit(MODEL.apply), jax.jit(Encoder(ENCODER).apply)


def test_logits_of_every_pair():
    out = apply(variables(), pairs(), LENGTHS)
    assert out.logits.shape == (BATCH, CLASSES)
    assert out.logits.dtype == jnp.float32
    assert out.layers.active.shape == (LAYERS, 1)
    assert_close(out.layers.elements, np.full(LAYERS, 24.0))


def encode(inputs: jax.Array, lengths: jax.Array) -> np.ndarray:
    """The means of the encoded documents (B, D), in float64."""
    valid = jnp.arange(inputs.shape[1])[None] < lengths[:, None]
    params = variables()["params"]
    x = jnp.where(valid[..., None], params["embedding"]["table"][inputs], 0)
    encoded = encoder({"params": params["encoder"]}, x, valid)[0]
    rows = zip(np.asarray(encoded, np.float64), lengths.tolist(), strict=True)
    return np.stack([row[:length].sum(0) / max(length, 1) for row, length in rows])


def decide(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The equation of Ren et al. 2023, section 4.1, number by number."""
    head = {name: np.asarray(variables()["params"]["head_hidden"][name], np.float64) for name in ("kernel", "bias")}
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    logits = []
    for a, b in zip(first, second, strict=True):
        hidden = gelu(np.concatenate([b, a, a * b, a - b]) @ head["kernel"] + head["bias"])
        logits.append(hidden @ np.asarray(variables()["params"]["head"]["kernel"], np.float64))
    return np.stack(logits)


@pytest.mark.breadth  # test_logits_of_every_pair; test_pairs_do_not_see_each_other
def test_features_are_those_of_two_documents_encoded_alone():
    """Also when the documents of a pair change places."""
    inputs = pairs()
    first, second = (encode(inputs[..., document], LENGTHS[:, document]) for document in (0, 1))
    logits = apply(variables(), inputs, LENGTHS).logits
    swapped = apply(variables(), inputs[..., ::-1], LENGTHS[:, ::-1]).logits
    assert_close(logits, decide(first, second))
    assert_close(swapped, decide(second, first))
    assert rms(logits - swapped) > 0.1 * rms(logits)


@pytest.mark.breadth  # test_models.py: test_classification_depends_on_the_real_symbols_of_its_sequence_alone
def test_padding_is_not_seen():
    """Neither what is in it, nor how long it is, in either document."""
    inputs, logits = pairs(), apply(variables(), pairs(), LENGTHS).logits
    for document in (0, 1):
        changed = jnp.where(PADDING, pairs(1), inputs)[..., document]
        other = inputs.at[..., document].set(changed)
        assert np.any(other != inputs)
        assert_close(apply(variables(), other, LENGTHS).logits, logits)
    longer = jnp.concatenate([inputs, pairs(2, 4)], 1)
    assert_close(apply(variables(), longer, LENGTHS).logits, logits)
    for document in (0, 1):
        seen = jnp.where(PADDING, inputs, (inputs + 1) % VOCABULARY)
        other = inputs.at[..., document].set(seen[..., document])
        assert rms(apply(variables(), other, LENGTHS).logits[1] - logits[1]) > 1e-3


@pytest.mark.parametrize("symbol", [-1, VOCABULARY])
def test_a_symbol_outside_the_vocabulary_is_nan_for_its_pair_alone_and_nothing_as_padding(symbol):
    expected = apply(variables(), pairs(), LENGTHS).logits
    np.testing.assert_array_equal(apply(variables(), jnp.where(PADDING, symbol, pairs()), LENGTHS).logits, expected)
    wrong = apply(variables(), pairs().at[1, 3, 1].set(symbol), LENGTHS).logits
    assert np.isnan(wrong[1]).all()
    assert_close(wrong[::2], expected[::2])


def test_pairs_do_not_see_each_other():
    inputs, logits = pairs(), apply(variables(), pairs(), LENGTHS).logits
    others = pairs(3).at[1].set(inputs[1])
    lengths = jnp.array([[2, 9], [1, 7], [8, 8]])
    assert_close(apply(variables(), others, lengths).logits[1], logits[1])


@pytest.mark.breadth  # test_models.py: gradients
def test_every_parameter_has_a_finite_gradient():
    value = lambda params: jax.nn.log_softmax(MODEL.apply({"params": params}, pairs(), LENGTHS).logits)[:, 0].sum()
    gradients = jax.jit(jax.grad(value))(variables()["params"])
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())
    for name in ("embedding", "head_hidden", "head'"):
        assert all(rms(leaf) > 1e-4 for path, leaf in leaves.items() if f"['{name}" in path)


@pytest.mark.breadth
def test_dropout_is_of_training_alone():
    layer = dataclasses.replace(LAYER, dropout=0.5)
    model = DualEncoder(dataclasses.replace(CONFIG, encoder=dataclasses.replace(ENCODER, layer=layer)))
    train = jax.jit(lambda key: model.apply(variables(), pairs(), LENGTHS, True, rngs={"dropout": key}).logits)
    plain = jax.jit(model.apply)(variables(), pairs(), LENGTHS)
    assert_close(plain.logits, apply(variables(), pairs(), LENGTHS).logits)
    first = train(jax.random.key(0))
    np.testing.assert_array_equal(first, train(jax.random.key(0)))
    assert rms(first - train(jax.random.key(1))) > 1e-2


def test_parameter_names_are_interface():
    """One embedding and one encoder for both documents; the layers' own names are in tests/golden."""
    params = dict(shapes(MODEL)["params"])
    encoder = params.pop("encoder")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves} == {
        "embedding/table": (VOCABULARY, D),
        "head_hidden/kernel": (4 * D, HEAD),
        "head_hidden/bias": (HEAD,),
        "head/kernel": (HEAD, CLASSES),
    }
    assert all(leaf.shape[0] == LAYERS for leaf in jax.tree.leaves(encoder["layers"]))
    default = RetrievalConfig(ENCODER, 2, VOCABULARY)
    assert shapes(DualEncoder(default))["params"]["head_hidden"]["kernel"].shape == (4 * D, 256)


@pytest.mark.parametrize("field", ["classes", "vocabulary_size", "head_size"])
def test_impossible_values_are_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field}=0: must be at least 1"):
        dataclasses.replace(CONFIG, **{field: 0})
