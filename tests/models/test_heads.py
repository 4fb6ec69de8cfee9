"""Every file of seqboat/models/heads: shapes, dtype, finite gradients, rows alone; and a model that takes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.plugs import find, names
from seqboat.choices import given_fields
from seqboat.layers.config import LayerConfig
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.models.heads import factored, linear, mlp
from seqboat.parallel.rules import Rules
from tests.helpers import assert_close, random_like

FEATURES, OUTPUTS = 8, 5
# What a task decides.
SIZES = {"vocabulary_size": 7, "length": 6, "channels": None, "clusters": (0, 1, 0, 2, 1)}
X = jax.random.normal(jax.random.key(0), (3, 4, FEATURES))


@pytest.mark.parametrize("name", names("seqboat.models.heads"))
def test_a_head_maps_every_row_alone_to_float32(name):
    cls = find("seqboat.models.heads", name, "head", "Config").Config
    head = cls(**{field: SIZES[field] for field in given_fields(cls)}).make(FEATURES, OUTPUTS)

    variables = random_like(jax.eval_shape(head.init, jax.random.key(1), X))
    params = variables["params"]

    @jax.jit
    def run(x, row):
        apply = lambda x: head.apply(variables, x)
        logits, transpose = jax.vjp(apply, x)
        return logits, apply(row), transpose(2 * logits)[0]

    logits, row, gradient = run(X, X[1, 2])
    low = jax.eval_shape(head.apply, variables, X.astype(jnp.bfloat16))
    assert logits.shape == (3, 4, OUTPUTS)
    assert logits.dtype == low.dtype == jnp.float32
    assert_close(row, logits[1, 2])
    assert np.isfinite(gradient).all()
    assert np.any(gradient != 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path({"head": params}):
        place = "/".join(key.key for key in path)
        assert len(Rules().names(place, leaf.ndim)) == leaf.ndim, place


@pytest.mark.breadth  # test_a_head_maps_every_row_alone_to_float32
@pytest.mark.parametrize(
    ("head", "same"), [("mlp", mlp.Config(dropout=0.2)), ("linear", linear.Config())], ids=["mlp", "linear"]
)
def test_a_name_is_the_head_with_the_dropout_of_the_layers(head, same):
    layer = LayerConfig(features=8, key_size=4, value_size=8, window_size=4, block_size=8, dropout=0.2)
    config = ClassifierConfig(EncoderConfig(layer, 1), 3, 7, head=head)
    tokens, lengths = jnp.ones((2, 6), int), jnp.full(2, 6)
    shapes = lambda config: jax.eval_shape(Classifier(config).init, jax.random.key(0), tokens, lengths)["params"]
    assert shapes(config) == shapes(dataclasses.replace(config, head=same))
    assert set(shapes(config)) == {"embedding", "encoder", "head", *(("head_hidden",) if head == "mlp" else ())}


@pytest.mark.parametrize(
    ("fields", "message"), [({"size": 0}, "size=0: must be"), ({"dropout": 1.0}, "dropout=1.0: must")]
)
def test_mistakes_of_the_mlp(fields, message):
    with pytest.raises(ValueError, match=message):
        mlp.Config(**fields)


@pytest.mark.parametrize("clusters", [(0,) * OUTPUTS, (0, 1, 2, 3, 4)], ids=["one cluster", "one per symbol"])
def test_a_factored_head_is_a_plain_one_in_the_limits(clusters):
    """With one cluster by its scores, with one for every symbol by its logits of clusters."""
    head, plain = factored.Config(clusters).make(FEATURES, OUTPUTS), linear.Config().make(FEATURES, OUTPUTS)
    params = random_like(jax.eval_shape(head.init, jax.random.key(0), X))["params"]
    own = params["coarse" if max(clusters) else "fine"]
    run = jax.jit(lambda: (head.apply({"params": params}, X), jax.nn.log_softmax(plain.apply({"params": own}, X))))
    assert_close(*run())


def test_a_factored_head_refuses_clusters_of_another_vocabulary():
    with pytest.raises(ValueError, match="clusters: must be one for each of the 5 symbols, not 2"):
        factored.Config((0, 1)).make(FEATURES, OUTPUTS)
    with pytest.raises(ValueError, match="clusters: must be numbered from 0 without gaps"):
        factored.Config((0, 2))
