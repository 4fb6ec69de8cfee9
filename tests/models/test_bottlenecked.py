"""Codebooks in a model: what it computes is that of its plain model with edits, and what codes learn from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, random_like

from seqboat.interp.codebooks import decode, nearest
from seqboat.layers import taps
from seqboat.layers.mixers import ema
from seqboat.layers.seqboat import LayerConfig
from seqboat.layers.terms import collect
from seqboat.models.bottlenecked import Bottlenecked, CodebookConfig, bind, force, widths
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.models.mlp import MLP, MLPConfig

LAYER = LayerConfig(8, 4, 6, mixer=ema.Config(2), window_size=3, causal=True, block_size=4)
TARGETS = {
    form: LanguageModel(LanguageModelConfig(EncoderConfig(dataclasses.replace(LAYER, form=form), 2), 5))
    for form in ("packed", "dense")
}
TARGET = TARGETS["packed"]
CONFIG = CodebookConfig(sites=("m", "gated"), codes=9, groups=2, weight=0.5)
MODELS = {form: Bottlenecked(target, CONFIG) for form, target in TARGETS.items()}
MODEL = MODELS["packed"]
TOKENS, LENGTHS = jnp.asarray(np.random.default_rng(0).integers(5, size=(2, 12))), jnp.array([12, 7])
REAL = np.arange(12) < np.asarray(LENGTHS)[:, None]
WEIGHTS = np.random.default_rng(1).standard_normal((2, 12, 5)) * REAL[..., None]


@functools.cache
def variables():
    found = random_like(jax.eval_shape(MODELS["dense"].init, jax.random.key(0), TOKENS, LENGTHS))  # traced sooner
    logits = found["params"]["target"]["encoder"]["layers"]["sparse"]["configurator"]["logits"]
    logits["bias"] = jnp.zeros_like(logits["bias"])
    return found


@functools.cache
def computed(form):
    """Of the model in training: logits, terms, and the gradients of the loss <WEIGHTS, logits> and of the terms."""

    def run(params):
        out, found = MODELS[form].apply({"params": params}, TOKENS, LENGTHS, True, mutable=["terms"])
        terms = collect(found["terms"])
        scaled = sum(each.scaled / jnp.maximum(each.weight, 1e-9) for each in terms.values())
        loss = (WEIGHTS * jnp.where(REAL[..., None], out.logits, 0)).sum()
        return (loss, scaled), (out.logits, terms)

    @jax.jit
    def both(params):
        _, back, (logits, terms) = jax.vjp(run, params, has_aux=True)
        both = jax.lax.map(lambda seed: back((seed[0], seed[1]))[0], jnp.eye(2))  # compiled once
        return logits, terms, [jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(2)]

    return both(variables()["params"])


@functools.cache
def plain(form):
    """The plain model, its variables, and what it computes: logits and taps."""
    model, bound = bind(MODELS[form], variables())
    apply = jax.jit(lambda v: model.apply(v, TOKENS, LENGTHS, mutable=["taps"]))
    output, found = apply(bound)
    return model, bound, apply, output.logits, found["taps"]


@pytest.mark.parametrize("form", grid(("packed", "dense"), "dense"))
def test_the_plain_model_with_edits_computes_the_same(form):
    logits, terms, _ = computed(form)
    model, bound, _, expected, found = plain(form)
    assert model is TARGETS[form]
    assert set(bound) == {"params", "edits"}
    assert_close(np.asarray(logits)[REAL], np.asarray(expected)[REAL])
    active = np.asarray(taps.read(found, "active"))[..., 0]
    assert 0 < active[:, REAL].mean() < 1
    for site, there in {"m": np.broadcast_to(REAL, active.shape), "gated": active}.items():
        x, tables = taps.read(found, site), variables()["params"]["codebooks"][site]
        distance, used, elements = 0.0, [], there.sum()
        for layer in range(2):
            ids = nearest(x[layer], tables[layer])
            squares = np.square(np.asarray(x[layer] - decode(tables[layer], ids))).sum(-1)
            distance += squares[there[layer]].sum()
            own = np.asarray(ids)[there[layer]][..., 0]
            used += [len(set(own[:, group].tolist())) / CONFIG.codes for group in (0, 1)]
        stated = terms[f"{site}_distance"]
        np.testing.assert_allclose(stated.total, distance, rtol=1e-4)
        np.testing.assert_allclose(stated.scaled, CONFIG.weight * stated.total, rtol=1e-6)
        assert stated.weight == elements
        in_use = terms[f"{site}_codes_in_use"]
        np.testing.assert_allclose(in_use.total / in_use.weight, np.mean(used), rtol=1e-6)
        assert in_use.scaled == 0


@pytest.mark.parametrize("form", grid(("packed", "dense"), "dense"))
def test_codes_get_the_loss_and_the_distance_and_the_model_the_loss_alone(form):
    _, _, (loss, terms) = computed(form)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(loss["codebooks"]))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(terms["target"]))
    # Through the codes of every layer the gradient reaches what comes before them.
    assert np.asarray(loss["target"]["encoder"]["layers"]["ssm"]["delta"]).all()
    found = plain(form)[4]
    active = np.asarray(taps.read(found, "active"))[..., 0]
    for site, there in {"m": np.broadcast_to(REAL, active.shape), "gated": active}.items():
        x, tables = taps.read(found, site), variables()["params"]["codebooks"][site]
        expected = np.zeros(tables.shape)
        for layer in range(2):
            ids = nearest(x[layer], tables[layer])
            apart = np.asarray(decode(tables[layer], ids) - x[layer]).reshape(2, 12, 2, -1)
            for row, position, group in np.argwhere(np.broadcast_to(there[layer][..., None], (2, 12, 2))):
                expected[layer, group, ids[row, position, group, 0]] += apart[row, position, group]
        # dC[i] += 2 weight (x^ - x), in the mean over elements.
        assert_close(terms["codebooks"][site], 2 * CONFIG.weight * expected / there.sum(), 1e-4)


@pytest.mark.breadth  # tests/interp/test_edits.py: edits in streams, Force
def test_streams_and_forced_codes():
    model, bound, apply, logits, _ = plain("packed")
    stream = jax.jit(lambda v, tokens, lengths, state: MODEL.apply(v, tokens, lengths, state, method="stream"))
    state, pieces = MODEL.initial_state(2), []
    for first in range(0, 12, 4):
        output, state = stream(variables(), TOKENS[:, first : first + 4], jnp.clip(LENGTHS - first, 0, 4), state)
        pieces.append(output.logits)
    assert_close(np.concatenate(pieces, 1)[REAL], np.asarray(logits)[REAL])

    here = np.zeros((2, 12), bool)
    here[0, 5] = True
    forced = force(model, bound, "m", {2: np.full((2, 12, 2, 1), 3)}, here)
    after, _ = apply(forced)
    changed = (np.asarray(after.logits) != np.asarray(logits)).any(-1)
    assert changed[0, 5]
    assert not changed[0, :5].any()
    assert not changed[1].any()
    own = nearest(taps.read(plain("packed")[4], "m")[1], variables()["params"]["codebooks"]["m"][1])
    same = force(model, bound, "m", {2: own}, np.ones((2, 12), bool))
    assert_close(np.asarray(apply(same)[0].logits)[REAL], np.asarray(logits)[REAL])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q", {1: 0}), "there are no codebooks at 'q', but at gated, m"),
        (("m", {3: 0}), "layer 3: layers are numbered from 1 to 2"),
        (("m", {1: 9}), r"codes 9\.\.9: a codebook has the codes 0\.\.8"),
    ],
)
def test_codes_that_cannot_be_forced(arguments, message):
    model, bound = bind(MODEL, variables())
    with pytest.raises(ValueError, match=message):
        force(model, bound, *arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": ("m", "x")}, r"sites=\('m', 'x'\): no 'x' in this model; there are attended, gate, gated"),
        pytest.param({"sites": ("active",)}, "no 'active' in this model", marks=pytest.mark.breadth),
        # test_codebook_runs.py: test_what_cannot_be_is_refused_in_one_line
        pytest.param({"groups": 3}, "groups=3: must divide 8, the width of m", marks=pytest.mark.breadth),
    ],
)
def test_sites_and_groups_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        widths(TARGET, CodebookConfig(**fields), TOKENS, LENGTHS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": 0}, "codes=0: must be at least 1"),
        ({"groups": 0}, "groups=0: must be at least 1"),
        ({"k": 3, "codes": 2}, r"k=3: must be in 1\.\.2, the codes"),
        ({"weight": -1.0}, "weight=-1.0: must not be negative"),
        ({"sites": ()}, r"sites=\(\): must be at least one"),
        ({"sites": ("m", "m")}, "each once"),
    ],
)
def test_mistakes_in_a_config(fields, message):
    with pytest.raises(ValueError, match=message):
        CodebookConfig(**fields)


def test_a_model_without_layers_has_no_sites():
    target = MLP(MLPConfig(classes=3))
    with pytest.raises(ValueError, match="a MLP has no layers"):
        widths(target, CodebookConfig(), jnp.zeros((1, 1, 4)), jnp.ones(1, int))
