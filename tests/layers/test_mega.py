"""The MEGA block: chunks, streams, padding, causality, configs. Published numbers: parity/test_published_mega.py."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like

from seqboat.layers.mega import LayerConfig, MegaLayer
from seqboat.layers.mixers import ema
from seqboat.parallel.rules import Layout, Rules

BATCH, LENGTH, WIDTH, CHUNK = 3, 23, 6, 5
LENGTHS = np.array([23, 14, 1])
VALID = np.arange(LENGTH) < LENGTHS[:, None]
CAUSAL = LayerConfig(WIDTH, 4, 7, chunk=CHUNK, causal=True, position="rotary", mixer=ema.Config(2))
BOTH = dataclasses.replace(
    CAUSAL, causal=False, attention_function="laplace", position="relative", max_positions=CHUNK, feed_forward_size=5
)
X, OTHER = normal(0, BATCH, LENGTH, WIDTH), normal(1, BATCH, LENGTH, WIDTH)


def shapes(config):
    layer = MegaLayer(config)
    row = jax.ShapeDtypeStruct((1, 1, config.features), jnp.float32)
    return jax.eval_shape(
        lambda x: layer.init(jax.random.key(0), x, jnp.ones((1, 1), bool), False, None, method="advance"), row
    )


def advance(config, variables, x, valid, state=None):
    return MegaLayer(config).apply(variables, x, jnp.asarray(valid), False, state, method="advance")


def schedule(size):
    """Valid elements of every piece (n, B): streams wait and pieces are empty, until all have had their elements."""
    rng, left, counts = np.random.default_rng(size), LENGTHS.copy(), [np.zeros(BATCH, int)]
    while left.any():
        piece = rng.integers(0, size + 1, BATCH) if len(counts) < LENGTH // size + 2 else np.full(BATCH, size)
        counts.append(np.minimum(piece, left))
        left = left - counts[-1]
    return np.stack(counts)


def cut(counts, size):
    """Pieces (n, B, size, D), with padding that must not be read."""
    pieces = np.full((len(counts), BATCH, size, WIDTH), 1e3, np.float32)
    done = np.cumsum(counts, 0) - counts
    for n, i in np.ndindex(counts.shape):
        pieces[n, i, : counts[n, i]] = X[i, done[n, i] : done[n, i] + counts[n, i]]
    return pieces


@pytest.mark.parametrize("size", grid((1, 7, LENGTH), 7))
def test_pieces_of_streams_equal_the_whole(size):
    config = dataclasses.replace(CAUSAL, attention_function="relu2")  # whose scores depend on the place in the chunk
    variables, counts = random_like(shapes(config)), {size: schedule(size)}

    @jax.jit
    def run(pieces):
        def feed(state, piece):
            x, count = piece
            y, (_, state) = advance(config, variables, x, jnp.arange(x.shape[1])[None] < count[:, None], state)
            return state, y

        start = MegaLayer(config).initial_state(BATCH)
        streams = {size: jax.lax.scan(feed, start, arrays)[1] for size, arrays in pieces.items()}
        return advance(config, variables, X, VALID)[0], streams

    whole, streams = run({size: (cut(count, size), count) for size, count in counts.items()})
    for size, count in counts.items():
        for i, length in enumerate(LENGTHS):
            parts = [streams[size][n, i, : count[n, i]] for n in range(len(count))]
            assert_close(np.concatenate(parts), np.asarray(whole[i, :length]))


@pytest.mark.parametrize("config", grid({"causal": CAUSAL, "both": BOTH}, "causal"))
def test_an_element_depends_on_what_it_may_see_alone(config):
    """Not on padding, not on other sequences and, causal, not on what comes later; within a chunk it sees the rest."""
    variables = random_like(shapes(config))
    later, mine = np.arange(LENGTH) > 11, np.arange(BATCH)[:, None] == 1
    cases = {
        "as it is": X,
        "later": jnp.where(later[None, :, None], OTHER, X),
        "padding and others": jnp.where((mine & VALID)[..., None], X, OTHER),
    }
    run = jax.jit(lambda cases: jax.lax.map(lambda x: advance(config, variables, x, VALID), cases))
    y, (stats, _) = run(jnp.stack(list(cases.values())))
    plain, changed, padded = (np.asarray(row[1, :14]) for row in y)
    assert_close(padded, plain)
    difference = np.abs(changed - plain).max(1)
    assert (difference[12:] > 1e-3).all()
    assert (difference[:12] < 1e-5).all() if config.causal else (difference[10:12] > 1e-3).all()
    assert stats.active.shape == (3, 0)
    assert_close(stats.elements, np.full(3, float(LENGTHS.sum())))


@pytest.mark.breadth  # tests/parity/test_published_mega.py: its full and chunked attention
def test_a_chunk_of_the_length_equals_none():
    """Values and gradients."""
    none = dataclasses.replace(BOTH, chunk=None, max_positions=LENGTH)
    variables = random_like(shapes(none))
    wider = dataclasses.replace(none, chunk=LENGTH)

    @jax.jit
    def run(variables):
        value = lambda config, x: (advance(config, variables, x, VALID)[0] * VALID[..., None]).sum()
        return [jax.value_and_grad(functools.partial(value, config))(X) for config in (none, wider)]

    expected, got = run(variables)
    assert_close(got, expected)


# What every field but these is changed to must change the numbers or the initial parameters.
KNOBS = {
    "features": 8,
    "key_size": 6,
    "value_size": 8,
    "chunk": 4,
    "causal": True,
    "attention_function": "relu2",
    "position": "rotary",
    "feed_forward_size": 6,
    "mixer": ema.Config(3),
    "norm": "rms",
    "norm_placement": "post",
    "norm_affine": False,
    "dropout": 0.5,
    "dtype": "bfloat16",
}
TOGETHER = {"max_positions": (9, {"chunk": None}), "norm_counts_padding": (True, {"norm": "batch"})}


def text(config):
    """What the layer computes to initialise itself and in training."""
    given = (jax.ShapeDtypeStruct((2, 9, config.features), jnp.float32), jax.ShapeDtypeStruct((2, 9), bool))
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    run = lambda x, valid: MegaLayer(config).init_with_output(keys, x, valid, True, None, method="advance")
    return str(jax.make_jaxpr(run)(*given))


@pytest.mark.breadth  # tests/parity/test_published_mega.py: its options
def test_every_field_does_something():
    texts = functools.cache(text)
    for field, value in KNOBS.items():
        assert texts(dataclasses.replace(BOTH, **{field: value})) != texts(BOTH), field
    for field, (value, others) in TOGETHER.items():
        config = dataclasses.replace(BOTH, **others)
        assert texts(dataclasses.replace(config, **{field: value})) != texts(config), field
    assert {*KNOBS, *TOGETHER, "layout"} == {field.name for field in dataclasses.fields(LayerConfig)}


def change(config, **fields):
    return lambda: dataclasses.replace(config, **fields)


def stream(**fields):
    return lambda: MegaLayer(dataclasses.replace(CAUSAL, **fields)).initial_state(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (change(CAUSAL, chunk=0), "chunk=0: must be at least 1, or None"),
        (change(CAUSAL, features=0), "features=0: must be at least 1"),
        (change(CAUSAL, feed_forward_size=-1), "feed_forward_size=-1: must be 0"),
        (change(CAUSAL, dropout=1.0), "dropout=1.0: must be in [0, 1)"),
        (change(CAUSAL, key_size=5), "key_size=5: rotary"),
        (change(CAUSAL, layout=Layout(Rules(), (("sequence", 2),))), "chunk=5: chunks are not split over devices"),
        (stream(chunk=None), "chunk=None cannot be streamed"),
        (stream(causal=False), "causal=False cannot be streamed"),
        (stream(norm="batch"), "norm='batch' cannot be streamed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
