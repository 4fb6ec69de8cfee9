"""Batches of no sequence, and sequences of no element: empty results, and gradients of zero."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import grid, normal, random_like

from seqboat.layers.mixers import s4d as s4d_mixer
from seqboat.layers.mixers.ema import Config
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.models.mlp import MLP, MLPConfig
from seqboat.models.retrieval import DualEncoder, RetrievalConfig
from seqboat.ops import ema, s4d
from seqboat.ops.blocks import Blocks, map_blocks
from seqboat.ops.convolution import fft_convolve, swap
from seqboat.ops.packing import RowInfo, compress, extract, pack, row_info
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend

LAYER = LayerConfig(
    4, 2, 4, mixer=Config(2), window_size=3, causal=True, max_positions=8, block_size=4, feed_forward_size=4
)
EMPTY = [(0, 3), (2, 0), (0, 0)]
KINDS = {
    "packed": {},
    "dense": {"form": "dense"},
    "kernel": {"attention_method": "pallas", "block_size": 16},
    "two directions": {"causal": False, "mixer": Config(2, method="chunked"), "norm": "batch", "position": "t5"},
    "s4d": {"mixer": s4d_mixer.Config(2), "activation": "always", "window_size": None},
}
MODELS = {
    "classifier": lambda encoder: Classifier(ClassifierConfig(encoder, 3, 5, sinusoid=True)),
    "language model": lambda encoder: LanguageModel(LanguageModelConfig(encoder, 5)),
    "retrieval": lambda encoder: DualEncoder(RetrievalConfig(encoder, 3, 5, head_size=4)),
}


def structure(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize(
    ("name", "kind"),
    grid(
        itertools.product(MODELS, KINDS),
        # test_packing_of_nothing; tests/layers/test_battery.py has an empty sequence in every batch
    ),
)
def test_results_and_gradients_of_nothing_have_their_shapes(name, kind):
    if name == "language model" and kind == "two directions":
        pytest.skip("a language model does not look ahead")
    model = MODELS[name](EncoderConfig(dataclasses.replace(LAYER, **KINDS[kind]), 1))
    pair = (2,) if name == "retrieval" else ()
    given = lambda batch, length: (jnp.zeros((batch, length, *pair), int), jnp.zeros((batch, *pair), int))
    variables = jax.eval_shape(model.init, jax.random.key(0), *given(1, 4))
    stats = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else {}

    def loss(params, stats, given):
        logits = model.apply({"params": params, **stats}, *given).logits
        return logits.sum(), logits

    gradient_and_logits = jax.grad(loss, has_aux=True)
    for batch, length in EMPTY:
        assert structure(jax.eval_shape(model.init, jax.random.key(0), *given(batch, length))) == structure(variables)
        gradient, logits = jax.eval_shape(gradient_and_logits, variables["params"], stats, given(batch, length))
        assert logits.shape == ((batch, length, 5) if name == "language model" else (batch, 3))
        assert structure(gradient) == structure(variables["params"])


# test_results_and_gradients_of_nothing_have_their_shapes
@pytest.mark.parametrize(("batch", "length"), grid(EMPTY))
def test_a_layer_without_elements_computes_nothing_and_keeps_its_state(batch, length):
    layer = SeqBoatLayer(LAYER)
    x, valid = jnp.zeros((batch, length, 4)), jnp.zeros((batch, length), bool)
    variables = random_like(jax.eval_shape(layer.init, jax.random.key(0), x, valid))

    def loss(params):
        y, stats = layer.apply({"params": params}, x, valid, True)
        return y.sum(), (y, stats)

    gradient, (y, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert y.shape == x.shape
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, stats)))
    assert not stats.elements
    state = jax.tree.map(jnp.ones_like, layer.initial_state(batch))
    advance = jax.jit(lambda state: layer.apply(variables, x, valid, False, state, method="advance"))
    y, (_, after) = advance(state)
    assert y.shape == x.shape
    jax.tree.map(np.testing.assert_array_equal, after, state)


# test_packing_of_nothing
@pytest.mark.parametrize(("batch", "length"), grid(EMPTY))
def test_operations_on_nothing(batch, length):
    x, valid = jnp.zeros((batch, length, 2)), jnp.zeros((batch, length), bool)
    params = ema.EMAParams(*(normal(seed, 4, 3) for seed in range(4)), normal(4, 2))
    for method in ("fft", "chunked", "reference"):
        assert ema.convolve(params, x, valid, method=method).shape == x.shape
        y, leaving = ema.convolve_piece(params, x, valid, method)
        assert [y.shape, *(state.shape for state in leaving)] == [x.shape, (batch, 2, 3), (batch, 2, 3)]
        assert ema.continuation(params, leaving, length).shape == x.shape
    state = jnp.ones((batch, 2, 3))
    after, y = ema.stream(params.direction(False), state, x, valid.sum(1))
    np.testing.assert_array_equal(after, state)
    assert y.shape == fft_convolve(x, normal(0, 2, 3)).shape == x.shape
    assert swap(x).shape == (batch, 2, length)
    own = s4d.S4DParams(normal(0, 2), *(normal(seed, 2, 3) for seed in range(4)), normal(5, 2))
    assert s4d.convolve(own, x, valid).shape == x.shape
    after, y = s4d.stream(own, state.astype(jnp.complex64), x, valid.sum(1))
    np.testing.assert_array_equal(after, state)
    assert y.shape == x.shape


@pytest.mark.parametrize(("batch", "length"), grid(EMPTY, (0, 0)))
def test_packing_of_nothing(batch, length):
    active = jnp.zeros((batch, length), bool)
    packing, rows = pack(active, 4, left=2, right=1), row_info(active)
    assert packing.source.tolist() == [-1] * 3
    assert packing.filled == 0
    packed = compress({"x": jnp.zeros((0, 5))}, packing)
    assert packed["x"].shape == (3, 5)
    blocks = Blocks(packing.filled, 4, 2, 1)
    run = jax.jit(
        lambda packed: map_blocks(lambda p, own, halo: own["x"] @ p, jnp.ones((5, 6)), packed, packed, blocks)
    )
    y = run(packed)
    assert y.shape == (3, 6)
    assert extract(y, packing).shape == (0, 6)
    some = row_info(jnp.ones((1, 3), bool))
    q, k, v = normal(0, 3, 2), normal(1, 3, 2), normal(2, 3, 5)
    for function in ("softmax", "relu2"):
        window = Window(2, True, function, "none")
        of_keys = jax.jit(functools.partial(attend, window, None))
        assert of_keys(q[:0], k, v, rows, some).shape == (0, 5)
        np.testing.assert_array_equal(of_keys(q, k[:0], v[:0], some, rows), np.zeros((3, 5)))
    assert isinstance(rows, RowInfo)


def test_an_mlp_wants_numbers():
    with pytest.raises(ValueError, match=r"inputs \(2, 0, 3\): an MLP needs at least one number"):
        MLP(MLPConfig(2)).init(jax.random.key(0), jnp.zeros((2, 0, 3)), jnp.zeros(2, int))
    run = jax.jit(MLP(MLPConfig(2)).init_with_output)
    assert run(jax.random.key(0), jnp.zeros((0, 4, 3)), jnp.zeros(0, int))[0].logits.size == 0
