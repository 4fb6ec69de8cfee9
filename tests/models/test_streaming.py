"""Streams in pieces equal the whole: the streaming contract, from the language model down to the packed rows."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, random_like, rms, vanishing
from hypothesis import given, settings
from hypothesis import strategies as st

from seqboat.layers.mixers import ema, s4d
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig
from seqboat.layers.streaming import MAX_IN_PLACE_LENGTH, fork, reset
from seqboat.models.encoder import EncoderConfig, separate
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.parallel.rules import Layout, Rules

BATCH, LENGTH, LAYERS, VOCABULARY = 3, 41, 2, 5
LAYER = LayerConfig(8, 4, 6, mixer=ema.Config(4), window_size=3, causal=True, max_positions=8, block_size=4)
CONFIGS = {
    "relative": LAYER,
    "rotary, relu2, window wider than blocks, centred router": dataclasses.replace(
        LAYER, position="rotary", attention_function="relu2", window_size=9, router=RouterConfig(centered=True)
    ),
    "slot, feed-forward, rms after, truncated": dataclasses.replace(
        LAYER,
        position="slot",
        feed_forward_size=6,
        norm="rms",
        norm_placement="post",
        mixer=ema.Config(4, truncation=5),
    ),
    "t5, laplace, always": dataclasses.replace(
        LAYER, position="t5", attention_function="laplace", activation="always", blocks_per_iteration=2
    ),
    "no position, s4d, dense": dataclasses.replace(LAYER, position="none", mixer=s4d.Config(4), form="dense"),
    "kernel": dataclasses.replace(LAYER, attention_method="pallas", block_size=16, position="rotary"),
    "never": dataclasses.replace(LAYER, activation="never"),
}


class Case:
    """A model, its variables, and its forms, each compiled once for every size of piece."""

    def __init__(self, layer, length=LENGTH, batch=BATCH):
        self.batch, self.length = batch, length
        self.model = LanguageModel(LanguageModelConfig(EncoderConfig(layer, LAYERS), VOCABULARY))
        self.tokens = np.random.default_rng(0).integers(VOCABULARY, size=(batch, length))
        self.lengths = jnp.full(batch, length)
        # The published initial values leave attention near zero: here every part matters.
        self.variables = random_like(jax.eval_shape(self.model.init, jax.random.key(0), self.tokens, self.lengths))
        self.apply = jax.jit(functools.partial(self.model.apply, mutable=["taps"]))
        self.stream = jax.jit(functools.partial(self.model.apply, method="stream"))
        self.tapped = jax.jit(functools.partial(self.model.apply, method="stream", mutable=["taps"]))
        self.learned = layer.activation == "learned"
        if self.learned:
            self.route("some")

    @property
    def router(self):
        return self.variables["params"]["encoder"]["layers"]["sparse"]["configurator"]["logits"]

    def route(self, level):
        """Let none, all or about a half of the elements be active, one layer after the other; no margin is close."""
        for layer in range(LAYERS):
            u = self.whole()[1]["encoder"]["layers"]["sparse"]["configurator"]["router_logits"][layer]
            for module in range(u.shape[2]):
                margin = np.sort(np.asarray(u[..., module, 1] - u[..., module, 0]).ravel())
                middle = margin[len(margin) // 3 : 2 * len(margin) // 3]
                widest = np.diff(middle).argmax()
                cut = {"none": margin[-1] + 1, "all": margin[0] - 1, "some": middle[widest : widest + 2].mean()}[level]
                self.router["bias"] = self.router["bias"].at[layer, 2 * module + 1].add(-cut)

    def whole(self):
        """(output, taps) of the parallel form."""
        output, sown = self.apply(self.variables, self.tokens, self.lengths)
        return output, sown["taps"]

    def feed(self, pieces, size, state=None, variables=None):
        """Pieces, each a number of elements for every stream, padded to one size: (logits of each stream, stats)."""
        state = self.model.initial_state(self.batch) if state is None else state
        done, logits, stats = np.zeros(self.batch, int), [[] for _ in range(self.batch)], []
        for piece in pieces:
            count = np.minimum(piece, self.length - done)
            tokens = np.full((self.batch, size), VOCABULARY - 1)  # padding that must not be read
            for i in range(self.batch):
                tokens[i, : count[i]] = self.tokens[i, done[i] : done[i] + count[i]]
            output, state = self.stream(variables or self.variables, tokens, jnp.asarray(count), state)
            for i in range(self.batch):
                logits[i].append(np.asarray(output.logits[i, : count[i]]))
            stats.append(output.layers)
            done += count
        return [np.concatenate(rows) for rows in logits], jax.tree.map(lambda *leaves: sum(leaves), *stats), state

    def check(self, pieces, size, variables=None):
        logits, stats, _ = self.feed(pieces, size, variables=variables)
        output = self.whole()[0]
        for i, rows in enumerate(logits):
            assert_close(rows, np.asarray(output.logits)[i, : len(rows)])
        if min(len(rows) for rows in logits) == self.length:
            for name in ("active", "confidence", "probability", "elements"):
                assert_close(getattr(stats, name), getattr(output.layers, name))


@functools.cache
def case(name):
    return Case(CONFIGS[name])


def even(size, length=LENGTH):
    return [np.full(BATCH, size)] * -(-length // size)


def uneven(size, seed=1):
    """Every stream at a place of its own, some of them waiting, until all are done."""
    rng = np.random.default_rng(seed)
    return [*rng.integers(0, size + 1, (LENGTH // size, BATCH)), *even(size)]


# Short pieces are computed in their places, longer ones packed.
# The dense form streams in test_generate.py and test_carry.py, s4d in tests/ops/test_s4d.py.
FAST = ("relative", 7)
EVERY = [(name, size) for name in CONFIGS for size in (7, 23) if (name, size) not in (("kernel", 7), ("never", 23))]


@pytest.mark.parametrize(("name", "size"), grid(EVERY, FAST))
def test_streams_at_different_positions_equal_the_whole(name, size):
    assert 7 <= MAX_IN_PLACE_LENGTH < 23
    if case(name).learned:
        active = np.asarray(case(name).whole()[0].layers.active)
        assert (active > 20).all()
        assert (active < 100).all()
    case(name).check(uneven(size), size)


@pytest.mark.breadth
def test_positions_drawn_beforehand_are_those_of_the_whole():
    Case(dataclasses.replace(LAYER, activation="random", activation_rate=0.4)).check(uneven(7), 7)


@pytest.mark.breadth  # test_generate.py: a step is compiled once
def test_element_by_element_with_parameters_that_were_taken_apart():
    case("relative").check(even(1), 1, separate(case("relative").variables))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, LENGTH])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_element_and_the_whole_are_pieces(name, size):
    case(name).check(even(size), size)


PIECES = st.lists(st.lists(st.integers(0, 23), min_size=BATCH, max_size=BATCH), min_size=1, max_size=6)


# test_streams_at_different_positions_equal_the_whole
@pytest.mark.breadth
@settings(deadline=None, max_examples=25, derandomize=True)
@given(PIECES)
def test_any_cuts_equal_the_whole(pieces):
    case("relative").check([np.array(piece) for piece in pieces], 23)


@pytest.mark.breadth  # test_streams_at_different_positions_equal_the_whole
@settings(deadline=None, max_examples=25, derandomize=True)
@given(PIECES)
def test_any_cuts_of_short_pieces_equal_the_whole(pieces):
    case("relative").check([np.array(piece) // 4 for piece in pieces], 7)


TWO = ("relative", "rotary, relu2, window wider than blocks, centred router")


@pytest.mark.parametrize("level", ["none", "all"])
@pytest.mark.parametrize("name", grid(TWO, "relative"))
def test_rates_of_activation(name, level):
    routed = case(name)
    try:
        routed.route(level)
        rate = np.asarray(routed.whole()[0].layers.active) / (BATCH * LENGTH)
        assert (rate == {"none": 0, "all": 1}[level]).all()
        for size in (7, 23):
            routed.check(uneven(size), size)
    finally:
        routed.route("some")


@pytest.mark.breadth  # test_generate.py: samples of one prompt
def test_single_streams_are_emptied_and_copied():
    """Stream 1 is reset, stream 2 continues from the state of stream 0, which continues too."""
    mine = case("relative")
    first, _, state = mine.feed(uneven(7)[:2] + even(7)[:2], 7)
    done = len(first[0])
    state = fork(reset(state, jnp.array([False, True, False])), jnp.array([0, 1, 0]))
    tokens = np.stack([mine.tokens[0, done : done + 7], mine.tokens[1, :7], mine.tokens[0, done : done + 7]])
    output, after = mine.stream(mine.variables, tokens, jnp.full(BATCH, 7), state)
    whole = np.asarray(mine.whole()[0].logits)
    assert 0 < done < LENGTH - 7
    for i, expected in enumerate([whole[0, done : done + 7], whole[1, :7], whole[0, done : done + 7]]):
        assert_close(output.logits[i], expected)
    assert_close(jax.tree.map(lambda leaf: leaf[0], after), jax.tree.map(lambda leaf: leaf[2], after))
    empty = mine.model.initial_state(BATCH)
    assert_close(reset(after, jnp.ones(BATCH, bool)), empty)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda state: reset(state, np.array([1], np.int32)),
            "which: expected 3 booleans, one per stream, not int32(1,)",
        ),
        (lambda state: reset(state, [True]), "which: expected 3 booleans, one per stream, not bool(1,)"),
        (lambda state: fork(state, [0, 3]), "source: [0, 3] has indices out of range; streams are 0..2"),
        (lambda state: fork(state, [-1]), "source: [-1] has indices out of range; streams are 0..2"),
        (lambda state: fork(state, 0), "source: expected a list of stream indices, not int32()"),
        (
            lambda state: fork(state, [True, False, False]),
            "source: expected a list of stream indices, not bool(3,)",
        ),
    ],
)
def test_streams_that_are_not_there_are_refused(call, message):
    assert BATCH == 3
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(case("relative").model.initial_state(BATCH))


@pytest.mark.breadth  # test_lists_say_which_streams; test_streams_that_are_not_there_are_refused
@pytest.mark.parametrize("number", [-1, 3])
def test_a_copy_of_no_stream_is_nan_in_a_compiled_program(number):
    """And not one of the last stream, which is the nearest, or the first from the end."""
    state = jax.tree.map(jnp.ones_like, case("relative").model.initial_state(BATCH))
    after = jax.jit(fork)(state, jnp.array([0, number]))
    for leaf in jax.tree.leaves(after):
        assert (leaf[0] == 1).all()
        assert (jnp.isnan(leaf[1]) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[1] == 0).all()


def test_lists_say_which_streams():
    state = at(case("relative").model.initial_state(BATCH), [1, 2, 3])
    now = lambda state: state[0].memories[0].now.tolist()
    assert now(reset(state, [False, True, False])) == [1, 0, 3]
    assert now(fork(state, [2, 2, 0, 1])) == [3, 3, 1, 2]
    assert now(jax.jit(fork)(state, jnp.array([2, 0]))) == [3, 1]


@pytest.mark.parametrize(("tokens", "lengths"), [((4,), (4,)), ((3, 4), (1,)), ((3, 4), ()), ((3, 0), (3,))])
def test_other_shapes_are_refused(tokens, lengths):
    mine = case("relative")
    state = mine.model.initial_state(BATCH)
    with pytest.raises(
        ValueError, match=re.escape(f"expected symbols (B, L) and lengths (B,), not {tokens} and {lengths}")
    ):
        mine.model.apply(
            mine.variables, jnp.ones(tokens, jnp.int32), jnp.ones(lengths, jnp.int32), state, method="stream"
        )


def at(state, position):
    """Streams that begin, but at this position."""
    move = lambda memory: memory._replace(now=memory.now + np.asarray(position).astype(np.int32))
    return tuple(layer._replace(memories=tuple(m and move(m) for m in layer.memories)) for layer in state)


@pytest.mark.parametrize("position", [10_000_000, 2**31 - 10, 2**32 - 20])
@pytest.mark.parametrize("name", grid(TWO, "relative"))
def test_far_out_is_as_exact_as_at_the_start(name, position):
    """Also where the 32 bits of a position wrap around."""
    mine = case(name)
    whole = np.asarray(mine.whole()[0].logits)
    for size in (7, 23):
        logits, *_ = mine.feed(uneven(size), size, at(mine.model.initial_state(BATCH), position))
        assert_close(np.stack(logits), whole)


@pytest.mark.breadth  # test_explain.py: taps of a run; tests/interp: what reads them
def test_taps_are_those_of_the_whole():
    mine = case("relative")
    _, taps = mine.whole()
    for size in (7, 23):
        _, sown = mine.tapped(
            mine.variables, mine.tokens[:, :size], jnp.full(BATCH, size), mine.model.initial_state(BATCH)
        )
        assert_close(sown["taps"], jax.tree.map(lambda leaf, n=size: leaf[:, :, :n], taps))


@pytest.mark.breadth  # the two tests before: taps of streams, and parameters that were taken apart
def test_taps_with_parameters_that_were_taken_apart_are_those_of_the_whole():
    mine, lengths = case("relative"), jnp.full(BATCH, 7)
    state = mine.model.initial_state(BATCH)
    apart = mine.tapped(separate(mine.variables), mine.tokens[:, :7], lengths, state)
    assert_close(apart[1]["taps"], jax.tree.map(lambda leaf: leaf[:, :, :7], mine.whole()[1]))


@pytest.mark.breadth  # test_carry.py: test_the_first_gradient_is_the_parallel_one
@pytest.mark.parametrize("size", [13, LENGTH])
def test_the_gradient_of_a_first_piece_is_that_of_the_parallel_form(size):
    """In evaluation a short one is computed in place; in training with what its router is paid."""
    mine, train = case("relative"), size > MAX_IN_PLACE_LENGTH
    router = RouterConfig(straight_through=True, key_credit=True, eviction_cost=True)
    model = LanguageModel(
        LanguageModelConfig(EncoderConfig(dataclasses.replace(LAYER, router=router), LAYERS), VOCABULARY)
    )
    tokens, lengths = jnp.asarray(mine.tokens[:, :size]), jnp.array([size, size - 4, size])
    weights = jnp.where(jnp.arange(size)[None] < lengths[:, None], 1.0, 0.0)[..., None]

    def loss(params, stream):
        if stream:
            state = model.initial_state(BATCH)
            output, _ = model.apply({"params": params}, tokens, lengths, state, train, method="stream")
        else:
            output = model.apply({"params": params}, tokens, lengths, train)
        return (jnp.sin(3 * output.logits) * weights).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(mine.variables["params"], False)
    assert_close(gradient(mine.variables["params"], True), expected, floor=vanishing(expected))


@pytest.mark.breadth  # test_carry.py: gradients of pieces; test_battery.py: gradients of both forms
def test_the_gradient_of_a_later_piece_is_that_of_the_dense_form():
    """Where rows of the memory are read, and blocks without rows of the piece's own are left out."""
    mine = case("relative")
    _, _, state = mine.feed(even(23)[:1], 23)
    tokens, lengths = jnp.asarray(mine.tokens[:, 23:]), jnp.array([18, 18, 3])
    weights = jnp.where(jnp.arange(18)[None] < lengths[:, None], 1.0, 0.0)[..., None]

    def gradient(form):
        encoder = EncoderConfig(dataclasses.replace(LAYER, form=form), LAYERS)
        model = LanguageModel(LanguageModelConfig(encoder, VOCABULARY))

        def loss(params):
            output, _ = model.apply({"params": params}, tokens, lengths, state, method="stream")
            return (jnp.sin(3 * output.logits) * weights).sum()

        return jax.jit(jax.grad(loss))(mine.variables["params"])

    expected = gradient("dense")
    assert_close(gradient("packed"), expected, floor=vanishing(expected))


@pytest.mark.breadth  # test_carry.py: the loss of every step, and the first gradient
def test_training_with_a_carried_state_is_truncated_backpropagation():
    """Parameters get the gradient of the second piece with everything that entered it held constant; the state none."""
    dropping = dataclasses.replace(
        LAYER,
        form="dense",
        dropout=0.3,
        hidden_dropout=0.3,
        router=RouterConfig(straight_through=True, key_credit=True),
    )
    mine = case("relative")
    model = LanguageModel(LanguageModelConfig(EncoderConfig(dropping, LAYERS), VOCABULARY))
    _, _, state = mine.feed(even(23)[:1], 23)
    tokens, lengths = jnp.asarray(mine.tokens[:, 23:]), jnp.array([18, 18, 3])

    def loss(params, floats, key):
        leaves = iter(floats)
        entered = jax.tree.map(lambda leaf: next(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)
        output, _ = model.apply(
            {"params": params}, tokens, lengths, entered, True, method="stream", rngs={"dropout": key}
        )
        return jnp.sin(3 * output.logits[:, 0]).sum()

    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (d_params, d_state) = run(mine.variables["params"], floats, jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(d_params))
    assert all(rms(leaf) > 0 for leaf in jax.tree.leaves(d_params["encoder"]["layers"]["gau"]["projection"]))
    assert not any(np.asarray(leaf).any() for leaf in d_state)
    assert value == run(mine.variables["params"], floats, jax.random.key(0))[0]
    assert value != run(mine.variables["params"], floats, jax.random.key(1))[0]


def test_a_state_holds_what_is_promised_and_no_more():
    (first, *_), mine = case("relative").model.initial_state(4), case("relative")
    width, slots = LAYER.features, 3 + MAX_IN_PLACE_LENGTH
    numbers = 4 * (width * LAYER.mixer.state_size + slots * (LAYER.key_size + LAYER.value_size + 1) + 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(first)) == numbers
    assert all(leaf.shape[0] == 4 and not np.asarray(leaf).any() for leaf in jax.tree.leaves(first))
    before = mine.model.initial_state(BATCH)
    after = mine.feed(even(23), 23)[2]
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(before)


MESH = Layout(Rules(), (("sequence", 2),))
REFUSED = {
    "mixer.truncation=5 cannot be streamed: only the EMA has a state": {"mixer": s4d.Config(4, truncation=5)},
    "window_size=None cannot be streamed": {"window_size": None},
    "layout=.* cannot be streamed: pieces cannot be split; split batches over the mesh, not sequences": {
        "layout": MESH
    },
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_streamed_is_refused_by_its_field(message, fields):
    layer = dataclasses.replace(LAYER, **fields)
    model = LanguageModel(LanguageModelConfig(EncoderConfig(layer, LAYERS), VOCABULARY))
    with pytest.raises(ValueError, match=message):
        model.initial_state(1)


@pytest.mark.parametrize("fields", [{"causal": False}, {"norm": "batch"}])
def test_layers_that_look_ahead_are_refused(fields):
    (field, value), *_ = fields.items()
    with pytest.raises(ValueError, match=f"{field}={value!r} cannot be streamed"):
        dataclasses.replace(LAYER, **fields).check_streaming()


def test_a_state_of_another_model_is_refused():
    mine = case("relative")
    other = LanguageModel(
        LanguageModelConfig(EncoderConfig(dataclasses.replace(LAYER, window_size=4), LAYERS), VOCABULARY)
    )
    tokens, lengths = jnp.asarray(mine.tokens[:, :7]), jnp.full(BATCH, 7)
    for state in (other.initial_state(BATCH), mine.model.initial_state(BATCH + 1), ()):
        with pytest.raises(ValueError, match=r"not one of 3 streams of this model: create it by initial_state\(3\)"):
            mine.model.apply(mine.variables, tokens, lengths, state, method="stream")


def test_parameters_that_were_taken_apart_are_for_evaluation():
    mine = case("relative")
    state = mine.model.initial_state(BATCH)
    with pytest.raises(ValueError, match="train=True: parameters unstacked by"):
        mine.model.apply(
            separate(mine.variables), jnp.asarray(mine.tokens[:, :7]), jnp.full(BATCH, 7), state, True, method="stream"
        )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 499])
@pytest.mark.parametrize("name", TWO)
def test_after_a_hundred_thousand_elements_the_stream_equals_the_whole(name, size):
    """Element by element (a scan of them), and in pieces, of two streams."""
    length, kept = 100_000, 1000
    mine = Case(dataclasses.replace(CONFIGS[name], block_size=128), length, batch=2)
    whole = np.asarray(mine.whole()[0].logits)[:, -kept:]
    variables = separate(mine.variables)
    count = length // size
    start = length - count * size

    @jax.jit
    def run(variables, tokens):
        state = mine.model.initial_state(2)
        if start:
            first = jnp.asarray(mine.tokens[:, :start])
            _, state = mine.model.apply(variables, first, jnp.full(2, start), state, method="stream")

        def step(state, piece):
            output, state = mine.model.apply(variables, piece, jnp.full(2, size), state, method="stream")
            return state, output.logits

        return jax.lax.scan(step, state, tokens)[1]

    tokens = mine.tokens[:, start:].reshape(2, count, size).swapaxes(0, 1)
    logits = np.asarray(run(variables, tokens)).swapaxes(0, 1).reshape(2, -1, VOCABULARY)
    assert_close(logits[:, -kept:], whole)
