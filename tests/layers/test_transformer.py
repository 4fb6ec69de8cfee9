"""The transformer block: its equations, its forms, and what config alone makes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like, vanishing

from seqboat.layers.router import RouterConfig
from seqboat.layers.transformer import LayerConfig, TransformerLayer, hidden_size
from seqboat.ops.packing import row_info
from seqboat.ops.positions import rotate
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend

D, BATCH, LENGTH, LENGTHS = 8, 3, 13, (11, 0, 7)
VALID = jnp.asarray(np.arange(LENGTH)[None] < np.array(LENGTHS)[:, None])
REAL = np.asarray(VALID)
FULL = LayerConfig(D, 2, block_size=4)
SLIDING = dataclasses.replace(FULL, window_size=3, causal=True)
ROUTED = dataclasses.replace(SLIDING, activation="learned")
CAPACITY = dataclasses.replace(FULL, causal=True, activation="learned", router=RouterConfig(rule="capacity"))
X, COTANGENT = normal(1, BATCH, LENGTH, D), jnp.where(VALID[..., None], normal(2, BATCH, LENGTH, D), 0)


@functools.cache
def parameters(config):
    return random_like(jax.eval_shape(TransformerLayer(config).init, jax.random.key(0), X, VALID)["params"])


@functools.cache
def compiled(config):
    """(params, x, valid) -> (y, taps, gradients of params and x)."""
    layer = TransformerLayer(config)

    @jax.jit
    def run(params, x, valid):
        def value(params, x):
            (y, _), changed = layer.apply({"params": params}, x, valid, mutable="taps")
            return jnp.vdot(y, COTANGENT), (y, changed["taps"])

        gradients, (y, taps) = jax.grad(value, argnums=(0, 1), has_aux=True)(params, x)
        return y, taps, gradients

    return run


def visible(config, active):
    """(B, L, L) by counting: the keys that each element reads."""
    rank = np.cumsum(active, axis=1)
    near = abs(rank[:, :, None] - rank[:, None, :]) <= (config.window_size or LENGTH)
    past = np.tri(LENGTH, dtype=bool)[None] if config.causal else True
    return near & past & active[:, None, :] & active[:, :, None]


def by_hand(config, p, x, active, confidence):
    """The equations in float64, a sequence and a head at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p["unit"])
    norm = lambda name, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"norm_{name}"]["scale"]
    out = np.array(x, np.float64)
    for b, see in enumerate(visible(config, active)):
        n = norm("attention", out[b])
        heads = []
        for h in range(config.heads):
            z = D // config.heads
            q, k, v = (n @ p[name]["kernel"][:, h * z : (h + 1) * z] for name in ("query", "key", "value"))
            angle = np.arange(LENGTH)[:, None] * 10000.0 ** (-np.arange(0, z, 2) / z)
            q, k = ((a[:, ::2] + 1j * a[:, 1::2]) * np.exp(1j * angle) for a in (q, k))
            weights = np.where(see, np.exp((q @ k.conj().T).real / np.sqrt(z)), 0)
            heads.append(weights @ v / np.maximum(weights.sum(1, keepdims=True), 1e-30))
        a = np.concatenate(heads, 1) @ p["output"]["kernel"]
        m = norm("mlp", out[b] + a)
        gate = m @ p["gate"]["kernel"]
        f = a + (gate / (1 + np.exp(-gate)) * (m @ p["up"]["kernel"])) @ p["down"]["kernel"]
        out[b] += np.where(active[b], confidence[b], 0)[:, None] * f
    return out


@pytest.mark.parametrize(
    "config", grid({"full": FULL, "sliding": SLIDING, "routed": ROUTED, "capacity": CAPACITY}, "routed")
)
def test_the_layer_is_its_equations_in_float64(config):
    y, taps, _ = compiled(config)(parameters(config), X, VALID)
    active, confidence = (np.asarray(taps["sparse"][name])[..., 0] for name in ("active", "confidence"))
    if config.activation == "learned":
        assert 1 < active.sum() < REAL.sum()
        logits = np.asarray(taps["sparse"]["configurator"]["router_logits"])[:, :, 0]
        np.testing.assert_array_equal(active, (logits[..., 1] > logits[..., 0]) & REAL)
    assert_close(y, by_hand(config, parameters(config), X, active, confidence))


@pytest.mark.breadth  # test_the_layer_is_its_equations_in_float64
@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
def test_the_layer_is_one_of_jaxs_own_attention_in_values_and_gradients(config):
    mask = jnp.asarray(visible(config, REAL) | np.eye(LENGTH, dtype=bool))

    @jax.jit
    def reference(p, x):
        def value(p, x):
            u, norm = p["unit"], lambda x: x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
            n = norm(x) * u["norm_attention"]["scale"][None, None]
            q, k, v = ((n @ u[name]["kernel"]).reshape(BATCH, LENGTH, 2, D // 2) for name in ("query", "key", "value"))
            turn = jax.vmap(jax.vmap(lambda a: rotate(a, jnp.arange(LENGTH)), 1, 1))
            a = jax.nn.dot_product_attention(turn(q), turn(k), v, mask=mask[:, None])
            a = a.reshape(x.shape) @ u["output"]["kernel"]
            n = norm(x + a) * u["norm_mlp"]["scale"][None, None]
            y = x + a + (jax.nn.silu(n @ u["gate"]["kernel"]) * (n @ u["up"]["kernel"])) @ u["down"]["kernel"]
            return jnp.vdot(y, COTANGENT), y

        gradients, y = jax.grad(value, argnums=(0, 1), has_aux=True)(p, x)
        return y, gradients

    p = parameters(config)
    y, _, gradients = compiled(config)(p, X, VALID)
    expected = reference(p, X)
    assert_close(y[REAL], expected[0][REAL])
    assert_close(gradients, expected[1], floor=vanishing(expected[1]))


@pytest.mark.breadth  # test_pieces_of_streams_are_the_whole: a window
def test_a_window_of_the_whole_length_is_none():
    p = parameters(FULL)
    y, _, gradients = compiled(dataclasses.replace(FULL, window_size=LENGTH))(p, X, VALID)
    expected = compiled(FULL)(p, X, VALID)
    assert_close((y, gradients), (expected[0], expected[2]))


def routed(level):
    """The parameters of ROUTED with a router that activates none, one, some or all real elements."""
    weight = np.asarray(normal(50, D))
    margin = np.sort(np.asarray(X)[REAL] @ weight)[::-1]
    cut = {"none": margin[0] + 1, "one": margin[:2].mean(), "some": margin[8:10].mean(), "all": margin[-1] - 1}[level]
    p = dict(parameters(ROUTED))
    configurator = dict(p["sparse"]["configurator"])
    kernel = np.stack([np.zeros(D), weight], 1).astype(np.float32)
    configurator["logits"] = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray([0, -cut], jnp.float32)}
    return {**p, "sparse": {"configurator": configurator}}


@pytest.mark.parametrize(("level", "count"), [("none", 0), ("one", 1), ("some", 9), ("all", 18)])
def test_packed_form_equals_dense_form(level, count):
    p = routed(level)
    y, taps, gradients = compiled(ROUTED)(p, X, VALID)
    expected = compiled(dataclasses.replace(ROUTED, form="dense"))(p, X, VALID)
    assert int(taps["sparse"]["active"].sum()) == count
    assert_close(y[REAL], expected[0][REAL])
    assert_close(gradients, expected[2], floor=vanishing(expected[2]))
    on = np.asarray(taps["sparse"]["active"])[..., 0]
    shapes = {"q": (2, 4), "k": (2, 4), "v": (2, 4), "attended": (2, 4), "unit_out": (D,)}
    for name, shape in shapes.items():
        assert taps["sparse"][name].shape == (BATCH, LENGTH, *shape)
        assert not np.asarray(taps["sparse"][name])[~on].any()
        assert_close(np.asarray(taps["sparse"][name])[on], np.asarray(expected[1]["sparse"][name])[on])
    assert_close(taps["resid"], y)


@pytest.mark.slow
def test_all_packed_rows_at_once_equal_the_dense_form():
    """The form of accelerators."""
    p = routed("some")
    y, _, gradients = compiled(dataclasses.replace(ROUTED, form="switched", blocks_per_iteration=3))(p, X, VALID)
    expected = compiled(dataclasses.replace(ROUTED, form="dense"))(p, X, VALID)
    assert_close(y[REAL], expected[0][REAL])
    assert_close(gradients, expected[2], floor=vanishing(expected[2]))


def test_padding_batch_mates_and_later_elements_change_nothing():
    p = routed("some")
    base = compiled(ROUTED)(p, X, VALID)[0]
    other = jnp.where(VALID[..., None], X, jnp.nan).at[2].set(3 * normal(4, LENGTH, D))
    y = compiled(ROUTED)(p, other, VALID.at[1:].set(True))[0]
    assert_close(y[0, : LENGTHS[0]], base[0, : LENGTHS[0]])
    later = compiled(ROUTED)(p, X.at[:, 5:].set(normal(5, BATCH, LENGTH - 5, D)), VALID)[0]
    assert_close(later[0, :5], base[0, :5])
    assert np.abs(np.asarray(later - base)[0, 5:]).max() > 0.1


def pieces_of(piece):
    layer, p = TransformerLayer(ROUTED), routed("some")
    run = jax.jit(lambda x, valid, state: layer.apply({"params": p}, x, valid, False, state, method="advance"))
    state, at, found = layer.initial_state(BATCH), np.zeros(BATCH, int), [[] for _ in LENGTHS]
    draw = np.random.default_rng(piece)
    while (at < LENGTHS).any():  # a different part of every stream
        count = np.minimum(draw.integers(0, piece + 1, BATCH), np.array(LENGTHS) - at)
        index = np.minimum(at[:, None] + np.arange(piece), LENGTH - 1)
        y, (_, state) = run(
            jnp.take_along_axis(X, jnp.asarray(index)[..., None], 1),
            jnp.asarray(np.arange(piece) < count[:, None]),
            state,
        )
        for stream, n in enumerate(count):
            found[stream].extend(np.asarray(y)[stream, :n])
        at += count
    return np.concatenate([np.reshape(rows, (-1, D)) for rows in found])


@pytest.mark.parametrize(
    "piece", [4, pytest.param(1, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.slow)]
)
def test_pieces_of_streams_are_the_whole(piece):
    assert_close(pieces_of(piece), compiled(ROUTED)(routed("some"), X, VALID)[0][REAL])


@pytest.mark.breadth  # test_the_layer_is_its_equations_in_float64
def test_one_head_without_a_feed_forward_network_is_attend():
    config = dataclasses.replace(FULL, heads=1)
    p = jax.tree.map(lambda leaf: leaf, parameters(config))
    p["unit"]["down"]["kernel"] = jnp.zeros((hidden_size(D), D))

    @jax.jit
    def expected(u, x):
        rows = row_info(VALID)
        n = (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)).reshape(-1, D)
        q, k, v = ((n * u["norm_attention"]["scale"][None]) @ u[name]["kernel"] for name in ("query", "key", "value"))
        q, k = rotate(q, rows.position), rotate(k, rows.position)
        o = attend(Window(None, False, "softmax", "rotary"), None, q, k, v, rows, rows)
        return x + (o @ u["output"]["kernel"]).reshape(x.shape)

    assert_close(compiled(config)(p, X, VALID)[0][REAL], expected(p["unit"], X)[REAL])


FIELDS = {
    "features": 12,
    "heads": 4,
    "window_size": 5,
    "causal": False,
    "norm": "layer",
    "norm_affine": False,
    "activation": "always",
    "router": RouterConfig(centered=True),
    "dropout": 0.1,
    "block_size": 8,
    "blocks_per_iteration": 2,
    "dtype": "bfloat16",
}


def text(config):
    x, layer = jnp.zeros((2, 20, config.features), config.dtype), TransformerLayer(config)
    valid, key = jnp.ones((2, 20), bool), jax.random.key(0)
    variables = jax.eval_shape(layer.init, key, x, valid)
    apply = lambda v: layer.apply(v, x, valid, True, rngs={"dropout": key}, mutable=["batch_stats"])
    return str(jax.make_jaxpr(apply)(variables))


@pytest.mark.breadth  # test_the_layer_is_its_equations_in_float64: its fields
def test_every_field_does_something():
    dense = dataclasses.replace(ROUTED, form="dense")  # traced faster
    texts = {form: text(dataclasses.replace(ROUTED, form=form)) for form in ("dense", "packed")}
    assert texts["dense"] != texts["packed"]
    for field, value in FIELDS.items():
        base = ROUTED if field.startswith("block") else dense
        assert text(dataclasses.replace(base, **{field: value})) != texts[base.form], field
    strided = dataclasses.replace(dense, activation="strided", activation_rate=0.5)
    assert text(strided) != text(dataclasses.replace(strided, activation_rate=0.25))
    fields = {field.name for field in dataclasses.fields(LayerConfig)}
    assert fields == {*FIELDS, "form", "activation_rate", "layout"}, "config.mesh makes the layout: tests/parallel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads=3: must divide features=8 into heads of an even width"),
        ({"heads": 8}, "heads=8: must divide features=8 into heads of an even width"),
        ({"heads": 0}, "heads=0: must be at least 1"),
        ({"window_size": 0}, "window_size=0: must be at least 1, or None for no limit"),
        ({"dropout": 1.0}, "dropout=1.0: must be in"),
        ({"activation": "random"}, "activation_rate=None: must be above 0"),
        ({"router": RouterConfig(rule="capacity")}, "router.rule='capacity': activation='always' has no router"),
        ({"router": RouterConfig(target_rate=0.3)}, "router.target_rate=0.3: activation='always' has no router"),
    ],
)
def test_what_does_not_go_together_is_said_by_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FULL, **changes)


def test_streams_need_a_window_and_the_past():
    with pytest.raises(ValueError, match="window_size=None cannot be streamed: it must be finite here"):
        TransformerLayer(dataclasses.replace(FULL, causal=True)).initial_state(1)
    with pytest.raises(ValueError, match="causal=False cannot be streamed"):
        TransformerLayer(dataclasses.replace(FULL, window_size=3)).initial_state(1)


def test_its_cost_is_that_of_its_products():
    always = FULL.multiplications(10, 0.5)
    assert always == 4 * D * D + 3 * D * 24 + 2 * D * 21
    assert ROUTED.multiplications(10, 0.5) == 2 * D + 0.5 * (4 * D * D + 3 * D * 24 + 2 * D * 4)
    assert "2 heads, window 3, activation learned, packed form of 1 x 4 rows" in ROUTED.describe(streaming=False)
