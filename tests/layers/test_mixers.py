"""One battery over every file of seqboat/layers/mixers: the contract of `seqboat.layers.mixer`. Nothing to list.

Parameter names are interface. Where those of a mixer are new or changed on purpose:
`SEQBOAT_WRITE_GOLDEN=1 python -m pytest tests/layers/test_mixers.py -k parameter_trees`.
"""

import dataclasses
import functools
import importlib
import inspect
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like

from seqboat.choices import choices
from seqboat.layers import mixers
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.parallel.rules import SINGLE_DEVICE, Layout, Rules

NAMES = sorted(path.stem for path in Path(mixers.__path__[0]).glob("[!_]*.py"))
BATCH, LENGTH, WIDTH, VOCABULARY = 3, 23, 16, 5
LENGTHS = np.array([23, 14, 1])
VALID = np.arange(LENGTH) < LENGTHS[:, None]
MASK = jnp.asarray(VALID)
CUT = 9
PIECES = (1, 7, 23)
X = normal(0, BATCH, LENGTH, WIDTH)
OTHER = normal(1, BATCH, LENGTH, WIDTH)
COTANGENT = normal(2, BATCH, LENGTH, WIDTH)
# Every row back to front within its length.
BACKWARD = np.where(VALID, LENGTHS[:, None] - 1 - np.arange(LENGTH), np.arange(LENGTH))


def config_of(name):
    return importlib.import_module(f"{mixers.__name__}.{name}").Config()


def make(config, causal=True):
    return config.make(causal, SINGLE_DEVICE)


def backward(x):
    return jnp.take_along_axis(x, jnp.asarray(BACKWARD)[..., None], axis=1)


def variables_of(config, causal):
    return random_like(jax.eval_shape(make(config, causal).init, jax.random.key(0), X, MASK))


def one_direction(two, one, index):
    """The parameters of one direction: an axis of 2 in front, or twice the rows. What both share is a direct term, of
    which each has a half, so that their sum has it once."""

    def select(leaf, like):
        if leaf.shape == like.shape:
            return leaf / 2
        return leaf.reshape(2, *like.shape)[index]

    return jax.tree.map(select, two, one)


def schedule(size):
    """Valid elements of every piece (n, B): streams wait, pieces are empty, until all have had their elements."""
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


def joined(pieces, counts):
    """The outputs of every stream, in order."""
    return [np.concatenate([pieces[n, i, : counts[n, i]] for n in range(len(counts))]) for i in range(BATCH)]


@functools.cache
def results(name):
    """Everything that is compared, from one compiled program."""
    config = config_of(name)
    causal, both = make(config), make(config, causal=False)
    variables, two = variables_of(config, True), variables_of(config, False)
    halves = [one_direction(two, variables, index) for index in range(2)]
    later = np.arange(LENGTH)[None, :, None] > CUT
    kept = (np.arange(BATCH)[:, None] == 1) & VALID
    at_cut = jnp.where((np.arange(LENGTH) == CUT)[None, :, None], COTANGENT, 0)
    cases = {
        "whole": (variables, X, at_cut),
        "later inputs changed": (variables, jnp.where(later, OTHER, X), at_cut),
        "padding and other sequences changed": (variables, jnp.where(kept[..., None], X, OTHER), at_cut),
        "forward half": (halves[0], X, at_cut),
        "backward half": (halves[1], backward(X), at_cut),
    }
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases.values())
    counts = {size: schedule(size) for size in PIECES} if config.stream_refusal() is None else {}
    pieces = {size: (cut(counts[size], size), counts[size]) for size in counts}

    @jax.jit
    def run(stacked, two, pieces):
        def case(arguments):
            variables, x, cotangent = arguments
            y, transpose = jax.vjp(lambda x: causal.apply(variables, x, MASK), x)
            return y, transpose(cotangent)[0]

        def feed(state, piece):
            x, count = piece
            valid = jnp.arange(x.shape[1])[None] < count[:, None]
            y, state = causal.apply(variables, x, valid, state, method="advance")
            return state, y

        start = causal.initial_state(BATCH, jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)) if pieces else None
        streams = {size: jax.lax.scan(feed, start, arrays)[1] for size, arrays in pieces.items()}
        first = causal.apply(variables, X[:, :1], MASK[:, :1])
        return jax.lax.map(case, stacked), both.apply(two, X, MASK), streams, first

    (y, dx), two_way, streams, first = jax.tree.map(np.asarray, run(stacked, two, pieces))
    index = {case: i for i, case in enumerate(cases)}
    return {
        "y": {case: y[i] for case, i in index.items()},
        "dx": dx[index["whole"]],
        "both": two_way,
        "streams": {size: joined(y, counts[size]) for size, y in streams.items()},
        "first": first,
    }


GOLDEN = Path(__file__).parents[1] / "golden" / "mixers.txt"

# The kinds: fixed and learned linear recurrences, a gated cell, a selective one, and one that cannot be streamed.
every_mixer = pytest.mark.parametrize("name", grid(NAMES, "ema", "lru", "lstm", "ssd", "hyperzzw"))
# What is compiled: a linear recurrence of complex states, and a cell. ema: test_battery.py, test_streaming.py and
# tests/parity; ssd: tests/ops/test_ssd.py and tests/parity/test_linear_mixers.py; hyperzzw: test_hyperzzw.py.
compiled_mixers = pytest.mark.parametrize("name", grid(NAMES, "lru", "lstm"))


@compiled_mixers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(name, dtype):
    """y is as x; states begin with the batch and are float32 or complex64, before a piece and after it."""
    config = config_of(name)
    module, x = make(config), X.astype(dtype)
    y = jax.eval_shape(module.apply, variables_of(config, True), x, MASK)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if config.stream_refusal() is None:
        start = module.initial_state(BATCH, jax.ShapeDtypeStruct((1, WIDTH), x.dtype))
        advance = functools.partial(module.apply, method="advance")
        y, after = jax.eval_shape(advance, variables_of(config, True), x, MASK, start)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        assert shapes(after) == shapes(start)
        leaves = jax.tree.leaves(start)
        assert {leaf.shape[0] for leaf in leaves} == {BATCH}
        assert {leaf.dtype.name for leaf in leaves} <= {"float32", "complex64"}


@compiled_mixers
def test_an_element_sees_no_later_one(name):
    found = results(name)
    reached = np.abs(found["dx"][0]).max(-1)
    assert (reached[: CUT + 1] > 0).all()
    assert (reached[CUT + 1 :] <= 1e-6 * reached[: CUT + 1].max()).all()
    y = found["y"]
    assert_close(y["later inputs changed"][:, : CUT + 1], y["whole"][:, : CUT + 1])
    assert np.abs(y["later inputs changed"][0, CUT + 1 :] - y["whole"][0, CUT + 1 :]).min() > 0


@compiled_mixers
def test_padding_and_other_sequences_change_nothing(name):
    y = results(name)["y"]
    assert_close(y["padding and other sequences changed"][1][VALID[1]], y["whole"][1][VALID[1]])
    assert np.isfinite(y["padding and other sequences changed"]).all()


@compiled_mixers
def test_pieces_of_streams_equal_the_whole(name):
    found = results(name)
    if not found["streams"]:
        pytest.skip("cannot be streamed")
    for size in PIECES:
        for i in range(BATCH):
            assert_close(found["streams"][size][i], found["y"]["whole"][i, : LENGTHS[i]])


@every_mixer
def test_the_arrays_of_a_state_are_not_shared(name):
    """A program that generates takes over the memory of each, which it cannot do twice."""
    if config_of(name).stream_refusal():
        pytest.skip("cannot be streamed")
    state = make(config_of(name)).initial_state(BATCH, jax.ShapeDtypeStruct((1, WIDTH), jnp.float32))
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@compiled_mixers
def test_one_element_is_a_sequence(name):
    found = results(name)
    assert_close(found["first"], found["y"]["whole"][:, :1])


@compiled_mixers
def test_both_directions_are_one_plus_the_other_backward(name):
    found = results(name)
    future = np.asarray(backward(jnp.asarray(found["y"]["backward half"])))
    assert_close(found["both"][VALID], found["y"]["forward half"][VALID] + future[VALID])


@compiled_mixers
def test_large_inputs_have_finite_values_and_gradients(name):
    """|x| = 30 for 512 elements, from the real initial values."""
    module = make(config_of(name))
    x = 30 * jnp.sign(normal(3, 1, 512, WIDTH))

    @jax.jit
    def run(key, x):
        valid = jnp.ones(x.shape[:2], bool)
        y, transpose = jax.vjp(lambda variables, x: module.apply(variables, x, valid), module.init(key, x, valid), x)
        return y, transpose(jnp.ones_like(y))

    y, gradients = run(jax.random.key(0), x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))
    assert np.abs(y).max() > 0


def other_values(config, field):
    """Configs that differ in this field alone, and are accepted."""
    value = getattr(config, field.name)
    if field.name in choices(type(config)):
        values = [choice for choice in choices(type(config))[field.name] if choice != value]
    elif isinstance(value, bool):
        values = [not value]
    else:
        values = (
            [value / 2] if isinstance(value, float) else [3] if value is None else [value + 1, 2 * value, value // 2]
        )
    for changed in values:
        try:
            other = dataclasses.replace(config, **{field.name: changed})
        except ValueError:
            continue
        if not other.width_refusal(WIDTH):
            yield other


def changed_configs(name):
    config = config_of(name)
    return [changed for field in dataclasses.fields(config) for changed in other_values(config, field)]


@compiled_mixers
def test_every_field_of_a_config_is_read(name):
    """It changes the initial values or the program: both are in the text of a program that does both."""

    x, valid = jnp.zeros((1, 80, WIDTH)), jnp.ones((1, 80), bool)  # longer than every chunk

    def program(config):
        return str(jax.make_jaxpr(make(config).init_with_output)(jax.random.key(0), x, valid))

    config = config_of(name)
    before = program(config)
    for field in dataclasses.fields(config):
        assert any(program(changed) != before for changed in other_values(config, field)), field.name


def parameter_trees(name):
    lines = [f"# {name}"]
    for causal in (True, False):
        leaves = jax.tree_util.tree_leaves_with_path(variables_of(config_of(name), causal)["params"])
        names = ("/".join(key.key for key in path) for path, _ in leaves)
        kind = "causal" if causal else "both"
        lines += [
            f"{kind} {name} {leaf.dtype}{list(leaf.shape)}" for name, (_, leaf) in zip(names, leaves, strict=True)
        ]
    return "\n".join(lines) + "\n"


def test_parameter_trees_are_those_of_checkpoints():
    text = "\n".join(map(parameter_trees, NAMES))
    if os.environ.get("SEQBOAT_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text


def layer_of(config, **fields):
    return LayerConfig(
        WIDTH, 4, 6, window_size=3, causal=True, block_size=4, mixer=config, activation="never", **fields
    )


@every_mixer
def test_refusals_are_those_of_the_layer(name):
    split = Layout(Rules(), (("sequence", 2),))
    for config in [config_of(name), *changed_configs(name)]:
        assert config.name == name
        if reason := config.stream_refusal():
            with pytest.raises(ValueError, match="mixer") as error:
                layer_of(config).check_streaming()
            assert str(error.value) == f"mixer.{reason}"
        else:
            layer_of(config).check_streaming()
        if reason := config.split_refusal():
            with pytest.raises(ValueError, match="mixer") as error:
                layer_of(config, layout=split)
            assert str(error.value) == f"mixer.{reason}"
        else:
            layer_of(config, layout=split)


@every_mixer
def test_a_config_says_what_it_costs(name):
    config = config_of(name)
    assert 0 < config.multiplications(WIDTH, True) <= config.multiplications(WIDTH, False)
    assert name in config.describe(LENGTH)
    assert inspect.getdoc(type(make(config)))


# A state of several arrays. Of one array: test_streaming.py; the streams of each mixer alone are compared above.
@pytest.mark.parametrize("name", grid(NAMES, "lstm"))
def test_a_language_model_streams_and_trains_with_it(name):
    """Through the layer, the scan over layers and rematerialisation. Attention has tests of its own: here is none."""
    config = config_of(name)
    if config.stream_refusal():
        pytest.skip("cannot be streamed")
    model = LanguageModel(LanguageModelConfig(EncoderConfig(layer_of(config), 1), VOCABULARY))
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(BATCH, LENGTH))
    lengths, counts = jnp.asarray(LENGTHS), schedule(7)
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), tokens, lengths))
    pieces, done = np.full((len(counts), BATCH, 7), VOCABULARY - 1), np.cumsum(counts, 0) - counts
    for n, i in np.ndindex(counts.shape):
        pieces[n, i, : counts[n, i]] = tokens[i, done[n, i] : done[n, i] + counts[n, i]]

    @jax.jit
    def run(variables, tokens, pieces, counts):
        def whole(params):
            logits = model.apply({**variables, "params": params}, tokens, lengths).logits
            return (logits * MASK[..., None]).var(), logits

        def feed(state, piece):
            output, state = model.apply(variables, *piece, state, method="stream")
            return state, output.logits

        gradients, logits = jax.grad(whole, has_aux=True)(variables["params"])
        return logits, gradients, jax.lax.scan(feed, model.initial_state(BATCH), (pieces, counts))[1]

    logits, gradients, streamed = run(variables, tokens, pieces, counts)
    for i, rows in enumerate(joined(np.asarray(streamed), counts)):
        assert_close(rows, np.asarray(logits)[i, : LENGTHS[i]])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients["encoder"]["layers"]["ssm"]):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
