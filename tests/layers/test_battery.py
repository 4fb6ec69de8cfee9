"""One battery that every configuration of the layer passes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, F32, assert_close, grid, normal, random_like, rms, tree_rms, vanishing

from seqboat.layers.mixers import ema, s4d
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer

D, Z, E = 8, 4, 6
# Three sequences, one of them empty and all of them padded; no window and no block divides a length.
BATCH, LENGTH, LENGTHS = 3, 13, (11, 0, 7)
VALID = jnp.asarray(np.arange(LENGTH)[None] < np.array(LENGTHS)[:, None])
CAUSAL = LayerConfig(D, Z, E, mixer=ema.Config(4), window_size=3, causal=True, max_positions=8, block_size=4)
BOTH = dataclasses.replace(CAUSAL, causal=False)

CONFIGS = {
    "causal": CAUSAL,
    "both directions": BOTH,
    "window wider than blocks, relu2, slot": dataclasses.replace(
        BOTH, window_size=6, attention_function="relu2", position="slot", norm="scale", norm_placement="post"
    ),
    "full, rotary": dataclasses.replace(CAUSAL, window_size=None, position="rotary", norm="rms"),
    "full, laplace, t5": dataclasses.replace(
        BOTH, window_size=None, attention_function="laplace", position="t5", norm="batch", norm_affine=False
    ),
    "always": dataclasses.replace(CAUSAL, activation="always", position="none", attention_function="relu2"),
    "never": dataclasses.replace(CAUSAL, activation="never"),
    "s4d, truncated": dataclasses.replace(BOTH, mixer=s4d.Config(4, truncation=5)),
    "feed-forward alone": dataclasses.replace(CAUSAL, attention=False, feed_forward_size=6),
    "attention and feed-forward": dataclasses.replace(BOTH, feed_forward_size=6),
    "kernel": dataclasses.replace(BOTH, attention_method="pallas", block_size=16),
    "bfloat16": dataclasses.replace(CAUSAL, dtype="bfloat16"),
    "router of all options": dataclasses.replace(
        CAUSAL, router=RouterConfig(centered=True, initial_bias=1.0, temperature_scale=0.5)
    ),
}


class Case:
    """A configuration, its parameters, and its forms, each compiled once for every test of it."""

    def __init__(self, config: LayerConfig):
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        self.tolerance = BF16 if config.dtype == "bfloat16" else F32
        self.modules = len(config.make_modules())
        self.learned = config.activation == "learned"
        self.x, self.cotangent = normal(1, BATCH, LENGTH, D), normal(2, BATCH, LENGTH, D)
        # The published initial values leave attention near zero: here every part matters.
        self.variables = random_like(
            jax.eval_shape(SeqBoatLayer(config).init, jax.random.key(0), self.x.astype(self.dtype), VALID)
        )

    @functools.cached_property
    def packed(self):
        return self._compile("packed")

    @functools.cached_property
    def dense(self):
        return self._compile("dense")

    def _compile(self, form):
        method = self.config.attention_method if form == "packed" else "blocks"
        layer = SeqBoatLayer(dataclasses.replace(self.config, form=form, attention_method=method))

        def apply(params, x, valid, others):
            (y, stats), changed = layer.apply({"params": params, **others}, x.astype(self.dtype), valid, mutable="taps")
            return y, (stats, changed["taps"])

        @jax.jit
        def run(params, x, valid, cotangent, others):
            y, transpose, aux = jax.vjp(lambda p, x: apply(p, x, valid, others), params, x, has_aux=True)
            return y, *aux, transpose(cotangent.astype(y.dtype))

        def call(params=None, x=None, valid=VALID, cotangent=None):
            """(y, stats, taps, (gradients of params, of x)) of <cotangent, y>; cotangents of padding are zero."""
            params = self.variables["params"] if params is None else params
            others = {name: value for name, value in self.variables.items() if name == "batch_stats"}
            cotangent = jnp.where(valid[..., None], self.cotangent if cotangent is None else cotangent, 0)
            return run(params, self.x if x is None else x, valid, cotangent, others)

        return call

    def routed(self, level: str) -> dict:
        """The parameters with a configurator that activates none, one, some or all real elements for every module."""
        if not self.learned:
            return self.variables["params"]
        m = np.asarray(jax.nn.silu(self.packed()[2]["ssm_out"]), np.float32)[np.asarray(VALID)]
        if self.config.router.centered:
            m = m - np.asarray(self.variables["batch_stats"]["sparse"]["configurator"]["mean"])
        kernel, bias = np.zeros((D, 2 * self.modules), np.float32), np.zeros(2 * self.modules, np.float32)
        for module in range(self.modules):
            kernel[:, 2 * module + 1] = np.asarray(normal(50 + module, D))
            margin = np.sort(m @ kernel[:, 2 * module + 1])[::-1]
            gaps = margin[:-1] - margin[1:]
            middle = len(margin) // 3 + int(gaps[len(margin) // 3 : 2 * len(margin) // 3].argmax())
            cuts = {"none": margin[0] + 1, "all": margin[-1] - 1, "one": margin[:2].mean()}
            cut = cuts.get(level, margin[middle : middle + 2].mean())
            bias[2 * module + 1] = -cut
        params = jax.tree.map(lambda leaf: leaf, self.variables["params"])
        params["sparse"]["configurator"]["logits"] = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        return params

    def wholly_active(self, params: dict, valid):
        """Inputs whose second sequence activates the first module everywhere, the first sequence as it was."""
        for seed in range(200):
            row = 3 * normal(100 + seed, 1, D) + jnp.zeros((LENGTH, 1))
            x = self.x.at[1].set(row)
            if self.packed(params, x, valid)[2]["sparse"]["active"][1].all(axis=0).any() or not self.modules:
                return x
        raise AssertionError("no constant sequence is wholly active")

    def close(self, got, expected):
        """Each leaf on its own scale, or on `vanishing`; in half precision the tree as a whole."""
        floor = (tree_rms if self.dtype == jnp.bfloat16 else vanishing)(expected)
        assert_close(got, expected, self.tolerance, floor=floor)


case_of = functools.cache(Case)


# Options of the others are in one of these, in test_naive.py, test_sparse_activation.py or test_streaming.py.
# Of attention by the kernel, tests/ops/test_window_attention_kernel.py. Both directions: the published layer in
# tests/parity, in values and gradients. Without attention: test_mixers.py.
FAST = ("causal",)


@pytest.fixture(params=grid(CONFIGS, *FAST))
def case(request):
    return case_of(request.param)


REAL = sum(LENGTHS)
COUNTS = {"none": {0}, "one": {1}, "some": set(range(2, REAL)), "all": {REAL}}


@pytest.mark.parametrize("level", COUNTS)
def test_packed_form_equals_dense_form(case, level):
    """Values, statistics, and the gradients of the input and of every parameter, all of them finite."""
    if not case.learned and level != "some":
        pytest.skip("without a configurator there is one level of activation")
    params = case.routed(level)
    y, stats, _, gradients = case.packed(params)
    expected = case.dense(params)
    if case.learned:
        assert all(int(count) in COUNTS[level] for count in stats.active)
    assert y.shape == (BATCH, LENGTH, D)
    assert y.dtype == case.dtype
    real = np.asarray(VALID)
    case.close(y[real], expected[0][real])
    case.close(stats, expected[1])
    case.close(gradients, expected[3])
    assert not np.asarray(gradients[1])[~real].any(), "padding sends no gradient back"


def test_what_is_active_is_recomputed_by_hand(case):
    """y = silu(x + skip + sum of active * confidence * result), from the taps, where modules tap their results."""
    if case.config.feed_forward_size or case.config.norm_placement == "post" or case.config.dtype != "float32":
        pytest.skip("this is of attention alone; a norm after it hides the sum; float32 alone is exact")
    y, _, taps, _ = case.packed(case.routed("some"))
    h = 0
    if case.modules:
        sparse = taps["sparse"]
        h = jnp.where(sparse["active"], sparse["confidence"] * sparse["gau_out"], 0)
    real = np.asarray(VALID)
    assert_close(y[real], jax.nn.silu(case.x + taps["skip"] + h)[real])


def test_taps_have_their_documented_names_and_shapes_and_agree_between_forms(case):
    documented = {"pre_norm": (D,), "ssm_out": (D,), "m": (D,), "skip": (D,), "resid": (D,)}
    sparse = {"active": (case.modules,), "confidence": (case.modules,)}
    attended = case.config.attention and case.config.activation != "never"
    if attended:
        sparse |= {"q": (Z,), "k": (Z,), "v": (E,), "gate": (E,), "attended": (E,), "gated": (E,), "gau_out": (D,)}
    if hidden := case.config.feed_forward_size:
        sparse |= {"feed_forward_hidden": (hidden,), "feed_forward_out": (D,)}
    params = case.routed("some")
    taps, expected = case.packed(params)[2], case.dense(params)[2]
    shapes = {name: value.shape[2:] for name, value in taps.items() if name != "sparse"}
    assert shapes == documented
    shapes = {name: value.shape[2:] for name, value in taps["sparse"].items() if name != "configurator"}
    assert shapes == sparse
    if case.learned:
        assert taps["sparse"]["configurator"]["router_logits"].shape == (BATCH, LENGTH, case.modules, 2)
    assert all(leaf.shape[:2] == (BATCH, LENGTH) for leaf in jax.tree.leaves(taps))
    on = np.asarray(taps["sparse"]["active"])
    assert not on[~np.asarray(VALID)].any()
    for name in set(sparse) - {"active", "confidence"}:
        value, computed = np.asarray(taps["sparse"][name]), on[..., -1 if name.startswith("feed_forward") else 0]
        case.close(value[computed], np.asarray(expected["sparse"][name])[computed])
        assert not value[~computed].any(), "zero where inactive"
        del taps["sparse"][name], expected["sparse"][name]
    real = np.asarray(VALID)
    case.close(*(jax.tree.map(lambda leaf: leaf[real], tree) for tree in (taps, expected)))


def test_no_output_depends_on_a_later_element(case):
    """By gradient, and by replacing all later elements, which may also change what they decide."""
    if not case.config.causal:
        pytest.skip("looks ahead")
    params, base = case.routed("some"), case.packed(case.routed("some"))[0]
    future = jnp.arange(LENGTH)[None, :, None]
    for t in (0, 4, 10):
        d_x = case.packed(params, cotangent=case.cotangent * (future == t))[3][1]
        assert rms(d_x[:, t + 1 :]) <= F32 * rms(d_x[:, : t + 1])  # the rounding of the FFT
        assert rms(d_x[0, t]) > 0
        changed = case.packed(params, x=jnp.where(future > t, 5 * normal(3, BATCH, LENGTH, D), case.x))[0]
        case.close(changed[0, : t + 1], base[0, : t + 1])


def test_both_directions_see_later_elements(case):
    if case.config.causal:
        pytest.skip("looks back only")
    d_x = case.packed(case.routed("some"), cotangent=case.cotangent * (jnp.arange(LENGTH) == 2)[None, :, None])[3][1]
    assert rms(d_x[0, 3:]) > 1e-2 * rms(d_x[0])


def test_batch_mates_change_nothing(case):
    """Sequence 0 has the same outputs and gradients among other mates, of which one is wholly active."""
    params, alone = case.routed("some"), case.cotangent.at[1:].set(0)
    y, _, _, (d_params, d_x) = case.packed(params, cotangent=alone)
    full = VALID.at[1].set(True)
    for x in (case.wholly_active(params, full), case.x.at[1:].set(4 * normal(7, 2, LENGTH, D))):
        other = case.packed(params, x, full, alone)
        case.close(other[0][0, : LENGTHS[0]], y[0, : LENGTHS[0]])
        case.close((other[3][0], other[3][1][0]), (d_params, d_x[0]))


# test_batch_mates_change_nothing; test_models.py: test_classification_depends_on_the_real_symbols_of_its_sequence_alone
@pytest.mark.parametrize("case", grid(CONFIGS), indirect=True)
def test_a_sequence_alone_and_padded_longer_is_the_same(case):
    params, others = case.routed("some"), {n: v for n, v in case.variables.items() if n == "batch_stats"}
    longer = jnp.concatenate([case.x[:1], 9 * normal(8, 1, 5, D)], 1)
    valid = jnp.arange(LENGTH + 5)[None] < LENGTHS[0]
    # Nobody asks for taps here, and nothing changes.
    y, stats = jax.jit(SeqBoatLayer(case.config).apply)({"params": params, **others}, longer.astype(case.dtype), valid)
    case.close(y[0, : LENGTHS[0]], case.packed(params)[0][0, : LENGTHS[0]])
    assert stats.elements == LENGTHS[0]


def test_numbers_in_padding_are_not_read(case):
    params, real = case.routed("some"), np.asarray(VALID)
    y, stats, _, gradients = case.packed(params)
    noisy = case.packed(params, jnp.where(VALID[..., None], case.x, 1e3 * normal(9, BATCH, LENGTH, D)))
    case.close((noisy[0][real], noisy[1], noisy[3]), (y[real], stats, gradients))


def test_a_batch_of_nothing_but_padding_is_finite(case):
    _, stats, _, gradients = case.packed(case.routed("all"), valid=jnp.zeros_like(VALID))
    assert stats.elements == 0
    assert not np.asarray(stats.active).any()
    for gradient in jax.tree.leaves(gradients):
        assert not np.asarray(gradient, np.float32).any()


@pytest.mark.breadth  # test_packed_form_equals_dense_form: its cases of half precision
def test_float32_is_what_bfloat16_approximates():
    """The same weights, everything active so that no decision can flip."""
    half, full = case_of(CONFIGS["bfloat16"]), case_of(CAUSAL)
    assert dataclasses.replace(half.config, dtype="float32") == full.config
    params, real = full.routed("all"), np.asarray(VALID)
    assert_close(half.packed(params)[0][real], full.packed(params)[0][real], BF16)


@pytest.mark.breadth  # test_packed_form_equals_dense_form: an odd length
@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("config", [CAUSAL, dataclasses.replace(BOTH, window_size=None)], ids=["window", "full"])
def test_other_lengths(config, length):
    x, valid = normal(0, 2, length, D), jnp.ones((2, length), bool)
    variables = random_like(jax.eval_shape(SeqBoatLayer(config).init, jax.random.key(0), x, valid))
    layers = [SeqBoatLayer(dataclasses.replace(config, form=form)) for form in ("packed", "dense")]
    packed, dense = jax.jit(lambda *args: [layer.apply(*args) for layer in layers])(variables, x, valid)
    assert_close(packed, dense)
    assert 0 < packed[1].elements == 2 * length


@pytest.mark.parametrize(("window_size", "method"), grid(itertools.product((4, None), ("fft", "chunked")), (4, "fft")))
def test_nothing_is_as_large_as_length_times_length(window_size, method):
    """No intermediate of the layer and its gradient has two axes of at least L, for packed rows; the dense form has."""
    length = 128

    def largest(form):
        config = dataclasses.replace(
            CAUSAL, window_size=window_size, block_size=8, form=form, mixer=ema.Config(2, method=method)
        )
        x, valid = jnp.zeros((1, length, D)), jnp.ones((1, length), bool)
        variables = jax.eval_shape(SeqBoatLayer(config).init, jax.random.key(0), x, valid)
        loss = lambda variables, x: SeqBoatLayer(config).apply(variables, x, valid)[0].sum()
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables, x)
        return [shape for shape in intermediates(jaxpr.jaxpr) if sum(size >= length for size in shape) > 1]

    assert largest("packed") == []
    assert largest("dense") != []


def intermediates(jaxpr):
    """The shapes of all values of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield from (getattr(variable.aval, "shape", ()) for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from intermediates(getattr(inner, "jaxpr", inner))


def is_jaxpr(value):
    return hasattr(value, "eqns")
