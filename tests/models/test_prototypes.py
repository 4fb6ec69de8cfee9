"""The head "prototypes": its terms and their gradients against float64, what they leave out, and what is refused."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.training.models import build_model
from seqboat.layers.config import LayerConfig
from seqboat.layers.terms import collect
from seqboat.models.classifier import ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.models.heads import prototypes
from seqboat.parallel.rules import Layout, Rules
from tests.helpers import grid, normal

B, L, F, V, D = 4, 5, 2, 6, 3
TERMS = ("reconstruction", "nearest_example", "nearest_prototype")
SIZES = {"count": 3, "size": 2}
# The last sequence is empty.
LENGTHS = np.array([5, 2, 4, 0])
VALID = np.arange(L)[None] < LENGTHS[:, None]


def head(**fields):
    return prototypes.Config(**{"length": L, "channels": None, **SIZES, **fields})


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def expected(params, x, inputs):
    """The terms in float64, sequence by sequence and element by element."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    z = 1 / (1 + np.exp(-dense("projection", np.asarray(x, np.float64))))
    decoded = dense("decoder", gelu(dense("decoder_hidden", z)))
    distances = np.array([[sum((a - p) ** 2) for p in params["prototypes"]] for a in z[:3]])
    if inputs.ndim == 3:
        errors = [(decoded[b].reshape(L, F)[: LENGTHS[b]] - inputs[b, : LENGTHS[b]]) ** 2 for b in range(3)]
        found = np.concatenate(errors).mean()
    else:
        found = 0.0
        for b in range(3):
            q = np.bincount(inputs[b, : LENGTHS[b]], minlength=V) / LENGTHS[b]
            r = np.exp(decoded[b]) / np.exp(decoded[b]).sum()
            found += sum(a * np.log(a / c) for a, c in zip(q, r, strict=True) if a) / 3
    return {
        "reconstruction": found,
        "nearest_example": distances.min(0).mean(),
        "nearest_prototype": distances.min(1).mean(),
    }


@pytest.mark.parametrize("symbols", grid({"numbers": False, "symbols": True}, "symbols"))
def test_terms_and_their_gradients_are_those_of_float64(symbols):
    config = head(vocabulary_size=V if symbols else None, channels=None if symbols else F, reconstruction=2.0)
    module = config.make(D, 2)
    x = normal(1, B, D)
    inputs = np.random.default_rng(2).integers(0, V, (B, L)) if symbols else np.asarray(normal(2, B, L, F))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    assert shapes["decoder"]["bias"].shape == (V if symbols else L * F,)
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(tree, [normal(10 + i, *leaf.shape) / 2 for i, leaf in enumerate(leaves)])

    @jax.jit
    def run(params, x, inputs, valid):
        def objective(params):
            _, found = module.apply({"params": params}, x, True, inputs, valid, mutable=["terms"])
            found = collect(found["terms"])
            return sum(term.scaled / jnp.maximum(term.weight, 1e-9) for term in found.values()), found

        return jax.grad(objective, has_aux=True)(params)

    gradient, found = run(params, x, inputs, VALID)
    wanted = expected(params, x, inputs)
    assert set(found) == set(TERMS)
    for name in TERMS:
        np.testing.assert_allclose(found[name].total / found[name].weight, wanted[name], rtol=1e-5)
    direction = jax.tree.unflatten(tree, [np.asarray(normal(50 + i, *leaf.shape)) for i, leaf in enumerate(leaves)])
    weights = {"reconstruction": 2.0, "nearest_example": 0.05, "nearest_prototype": 0.05}
    moved = lambda h: jax.tree.map(lambda p, d: np.asarray(p, np.float64) + h * d, params, direction)
    total = lambda h: sum(weights[name] * value for name, value in expected(moved(h), x, inputs).items())
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    slope = sum((np.asarray(g, np.float64) * d).sum() for g, d in pairs)
    np.testing.assert_allclose(slope, (total(1e-5) - total(-1e-5)) / 2e-5, rtol=1e-4)

    other = np.where(VALID if symbols else VALID[..., None], inputs, V + 3 if symbols else np.nan)
    again = run(params, x.at[3].set(7.0), other, VALID)
    for leaf, was in zip(jax.tree.leaves(again), jax.tree.leaves((gradient, found)), strict=True):
        np.testing.assert_array_equal(leaf, was, "padding, and a sequence without elements, are in no term")
    nothing = run(params, x, inputs, np.zeros_like(VALID))  # as in a small part of a batch
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))


def test_evaluation_states_no_terms_and_decodes_nothing():
    for fields, decoder in (({}, {"decoder", "decoder_hidden"}), ({"reconstruction": 0.0}, set())):
        module = head(vocabulary_size=V, **fields).make(D, 2)
        x, inputs, valid = jnp.ones((B, D)), jnp.ones((B, L), int), jnp.asarray(VALID)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        assert set(variables["params"]) == {"projection", "prototypes", "votes", *decoder}
        stated = []
        for train in (False, True):
            apply = functools.partial(module.apply, train=train, mutable=["terms"])
            stated.append(jax.eval_shape(apply, variables, x, inputs=inputs, valid=valid)[1].get("terms", {}))
        assert [set(one) for one in stated] == [set(), set(TERMS) - (set() if decoder else {"reconstruction"})]


def test_distances_are_never_negative():
    z = 1000 + normal(3, 50, 4) / 100
    found = prototypes.squared_distances(z, z[:7])
    assert found.shape == (50, 7)
    assert (np.diagonal(found) == 0).all()
    assert (found >= 0).all()
    np.testing.assert_allclose(found, np.square(np.float64(z)[:, None] - np.float64(z)[None, :7]).sum(-1))
    a, b = np.asarray(z), np.asarray(z[:7])
    product = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]
    assert (product < 0).any(), "what the expansion gives"


def test_symbols_outside_of_the_vocabulary_have_no_share():
    symbols = jnp.array([[1, 1, 5, 0, 9], [-1, 6, 0, 0, 0], [2, 2, 2, 2, 2]])
    valid = jnp.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    found = prototypes.frequencies(symbols, valid, V)
    np.testing.assert_array_equal(found, [[0.25, 0.5, 0, 0, 0, 0.25], [0] * 6, [0] * 6])


LAYER = {"layers": 1, "features": 8, "key_size": 4, "value_size": 8}


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"count": 0}, {}, "count=0: must be at least 1"),
        ({"size": 0}, {}, "size=0: must be at least 1"),
        *(({name: -0.1}, {}, f"{name}=-0.1: must not be negative") for name in TERMS),
        ({"length": 5}, {}, "length: not set here, the task decides it"),
        (
            {},
            {"vocabulary_size": None, "length": 2049, "channels": 2},
            "reconstruction=0.05: must be 0, which makes no decoder, for sequences of 2049 x 2 numbers: a decoder "
            "takes at most 4096",
        ),
        (
            {},
            {"vocabulary_size": None},
            "reconstruction=0.05: must be 0, which makes no decoder, for a task that does not tell the channels of its "
            "inputs",
        ),
    ],
)
def test_mistakes(fields, sizes, message):
    task = SimpleNamespace(**{"vocabulary_size": V, "length": L, "classes": 2, **sizes})
    with pytest.raises(UserError) as caught:
        build_model({"name": "classifier", **LAYER, "head": {"name": "prototypes", **fields}}, task)
    assert str(caught.value) == f"config.model.head.{message}"


def test_what_needs_no_decoder_may_be_long():
    task = SimpleNamespace(vocabulary_size=None, length=16_000, channels=1, classes=2)
    values = {"name": "classifier", **LAYER, "head": {"name": "prototypes", "reconstruction": 0.0}}
    assert build_model(values, task).config.head.length == 16_000


def test_a_language_model_and_split_sequences_are_refused():
    task = SimpleNamespace(vocabulary_size=V, length=L)
    values = {"name": "language_model", "causal": True, **LAYER, "head": {"name": "prototypes"}}
    with pytest.raises(UserError, match=r"^config\.model\.head\.name='prototypes': it is for classifiers, since"):
        build_model(values, task)
    layer = LayerConfig(features=8, key_size=4, value_size=8, layout=Layout(Rules(), (("sequence", 2),)))
    with pytest.raises(ValueError, match=r"^head: this one reads whole sequences; take a config\.mesh that does not"):
        ClassifierConfig(EncoderConfig(layer, 1), 2, V, head=head(vocabulary_size=V))
