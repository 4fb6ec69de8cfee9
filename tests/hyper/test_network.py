"""A module with generated parameters: every head, with residual or not, shared or an example's own, any target."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat import hyper
from seqboat.hyper.heads import Trunk
from seqboat.paths import flatten
from tests.helpers import assert_close, grid, random_like
from tests.hyper.targets import LENGTHS, MLP, TARGETS, TOKENS, X, classifier

NET, KEY = MLP(), jax.random.key(0)
PLAIN = jax.jit(NET.apply)
HALF = jnp.array([0.5])
HEADS = ("full", "low_rank", "scale", "chunked", "recurrent")


@functools.cache
def plain_spec():
    return hyper.spec(NET, X, draws=4)


def make(net=NET, spec=None, per_example=False, **fields) -> hyper.Hyper:
    config = hyper.HyperConfig(**{"hidden": (8,), "chunk_size": 40, **fields})
    return hyper.Hyper(net, hyper.HyperNetwork(plain_spec() if spec is None else spec, config), per_example)


def started(model: nn.Module, condition, *args, **kwargs):
    """Variables without zeros: zero offsets and biases would hide what is not added."""
    return random_like(jax.eval_shape(model.init, KEY, condition, *args, **kwargs))


def unconditioned(net):
    return random_like(jax.eval_shape(net.init, KEY, X))


# The others are covered by test_low_rank_deltas_have_low_rank_and_full_ones_have_not,
# test_one_chunk_of_a_leaf_is_a_full_head_on_the_trunk_of_code_and_embedding,
# test_a_factor_of_one_changes_nothing_and_others_scale_columns and
# test_one_piece_of_a_recurrent_head_is_one_step_of_an_lstm_cell.
@pytest.mark.parametrize(
    ("head", "residual"),
    grid(itertools.product(HEADS, (True, False)), ("scale", False)),
)
def test_every_head_generates_what_the_target_computes_with(head, residual):
    if head == "scale" and not residual:
        with pytest.raises(ValueError, match="needs residual=True"):
            make(head=head, residual=residual)
        return
    model = make(head=head, residual=residual, init="fan_out")
    variables = started(model, HALF, X)
    stored = set(flatten(variables["params"].get("target", {})))
    assert stored == ({leaf.path for leaf in plain_spec()} if residual else set())
    bind = jax.jit(lambda condition: hyper.bind(model, variables, condition))
    low, high = (bind(jnp.array([z])) for z in (0.2, 0.9))
    assert {path: a.shape for path, a in flatten(low["params"]).items()} == {
        leaf.path: leaf.shape for leaf in plain_spec()
    }
    for path, leaf in flatten(low["params"]).items():
        assert np.abs(leaf - flatten(high["params"])[path]).max() > 0, f"{path} does not depend on the condition"
    np.testing.assert_array_equal(model.apply(variables, jnp.array([0.2]), X), NET.apply(low, X))


@pytest.mark.breadth  # test_keywords_are_split_among_examples_too
@pytest.mark.parametrize("head", ["full", *(pytest.param(h, marks=pytest.mark.slow) for h in HEADS[1:])])
def test_an_examples_own_parameters_are_those_of_a_loop(head):
    model, own = make(head=head), make(head=head, per_example=True)
    conditions = jnp.linspace(0, 1, 4)[:, None]
    variables = started(model, HALF, X)
    assert jax.tree.structure(jax.eval_shape(own.init, KEY, conditions, X)) == jax.tree.structure(variables)
    loss = lambda params, model, z, x: jnp.sum(jnp.sin(model.apply({"params": params}, z, x)))
    at_once = jax.jit(jax.value_and_grad(lambda p: loss(p, own, conditions, X)))(variables["params"])
    looped = jax.jit(jax.value_and_grad(lambda p: sum(loss(p, model, conditions[i], X[i : i + 1]) for i in range(4))))(
        variables["params"]
    )
    assert_close(at_once, looped, 1e-5, floor=1e-2)
    apply, own_apply = jax.jit(model.apply), jax.jit(own.apply)
    rows = jnp.concatenate([apply(variables, conditions[i], X[i : i + 1]) for i in range(4)])
    assert_close(own_apply(variables, conditions, X), rows, 1e-6)
    np.testing.assert_allclose(own_apply(variables, conditions[:1], X[:1]), rows[:1], rtol=1e-6, atol=1e-6)


MARKS = {"seqboat": pytest.mark.slow, **dict.fromkeys(("conv", "lstm", "s4d"), pytest.mark.breadth)}


@pytest.mark.breadth  # test_zero_heads_start_as_the_target_and_learn
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in TARGETS])
def test_any_target_starts_as_itself_with_zero_heads_bit_for_bit(name):
    module, args, _ = TARGETS[name]
    model = make(module, hyper.spec(module, *args), init="zero")
    plain = jax.jit(module.init)(jax.random.key(5), *args)
    variables = hyper.start_from(jax.jit(model.init)(KEY, HALF, *args), plain)
    apply, wanted = jax.jit(model.apply), jax.jit(module.apply)(plain, *args)
    for z in (0.0, 0.7):
        assert_equal(apply(variables, jnp.array([z]), *args), wanted)


def assert_equal(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("head", grid(HEADS, "full"))
def test_zero_heads_start_as_the_target_and_learn(head):
    """The trunk gets no gradient at first, and does as soon as the head has moved."""
    model = make(head=head, init="zero")
    variables = jax.jit(model.init)(KEY, HALF, X)
    apply = jax.jit(lambda params, z: model.apply({"params": params}, z, X))
    plain = PLAIN({"params": variables["params"]["target"]}, X)
    np.testing.assert_array_equal(apply(variables["params"], HALF), plain)
    loss = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, HALF, X)))))
    gradient = loss(variables["params"])
    network = gradient["network"]
    first = {"full": ["full"], "scale": ["scale"], "low_rank": ["low_rank", "full"]}.get(head, [f"{head}/scale"])
    leaves = {path: leaf for path, leaf in flatten(network).items() if path.startswith(tuple(first))}
    assert any(np.any(leaf) for leaf in leaves.values())
    trunk = [leaf for path, leaf in flatten(network).items() if "trunk" in path or "lstm" in path]
    assert trunk
    assert not any(np.any(leaf) for leaf in trunk)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    again = flatten(loss(moved)["network"])
    assert all(np.any(leaf) for path, leaf in again.items() if "trunk" in path and path.endswith("kernel"))
    assert np.abs(apply(moved, jnp.array([0.1])) - apply(moved, HALF)).max() > 0


# test_every_head_generates_what_the_target_computes_with
@pytest.mark.parametrize("head", grid(("chunked", "recurrent")))
def test_leaves_that_start_as_constants_are_conditioned_by_chunks_too(head):
    net = MLP(norm=True)
    model = make(net, hyper.spec(net, X, select="norm_0/scale", draws=4), head=head, init="matched", residual=False)
    variables = jax.jit(model.init)(KEY, HALF, X)
    bound = jax.jit(lambda variables: hyper.bind(model, variables, HALF))(variables)
    np.testing.assert_array_equal(bound["params"]["norm_0"]["scale"], 1)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, HALF, X)))))(
        variables["params"]
    )
    assert np.any(gradient["network"][head]["scale"])


@pytest.mark.breadth
def test_the_seqboat_classifier_with_batch_statistics_and_dropout_under_a_scan_over_layers():
    model = classifier(norm="batch")
    spec = hyper.spec(model, TOKENS, LENGTHS, select=("**/configurator/*", "**/ssm/*", "**/gau/*/kernel"))
    hypered = make(model, spec, heads=(("**/gau/*/kernel", "scale"),))
    variables = jax.jit(hypered.init)(KEY, HALF, TOKENS, LENGTHS)
    assert "batch_stats" in variables

    @jax.jit
    def run(variables, train_key):
        out, changed = hypered.apply(
            variables, HALF, TOKENS, LENGTHS, True, rngs={"dropout": train_key}, mutable=["batch_stats"]
        )
        bound = hyper.bind(hypered, variables, HALF)
        plain, own = model.apply(bound, TOKENS, LENGTHS, True, rngs={"dropout": train_key}, mutable=["batch_stats"])
        return out.logits, changed["batch_stats"]["target"], plain.logits, own["batch_stats"]

    logits, stats, plain, own = run(variables, jax.random.key(2))
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-6)
    assert_close(stats, own, 1e-5, floor=1e-3)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), stats, variables["batch_stats"]["target"])
    assert any(jax.tree.leaves(moved))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5)(nn.Dense(64, name="dense")(x), deterministic=not train)


def test_dropout_draws_for_every_example_its_own():
    x, conditions = jnp.ones((2, 3)), jnp.full((2, 1), 0.5)
    model = make(Dropped(), hyper.spec(Dropped(), x), per_example=True)
    variables = started(model, conditions, x)
    out = jax.jit(lambda variables: model.apply(variables, conditions, x, True, rngs={"dropout": KEY}))(variables)
    assert np.any((out[0] == 0) != (out[1] == 0))


class Masked(nn.Module):
    """Arrays by keyword, a scalar besides the result, and something sown."""

    @nn.compact
    def __call__(self, x, *, mask, scale=1.0):
        y = nn.Dense(5, name="dense")(x) * mask * scale
        self.sow("intermediates", "y", y)
        return y, jnp.sum(y)


def test_keywords_are_split_among_examples_too():
    x, mask = X, jnp.eye(4, 5)
    conditions = jnp.linspace(0, 1, 4)[:, None]
    spec = hyper.spec(Masked(), x, mask=mask)
    model, own = make(Masked(), spec), make(Masked(), spec, per_example=True)
    variables = started(model, HALF, x, mask=mask)
    alone = jax.jit(functools.partial(model.apply, scale=2.0))
    together = jax.jit(functools.partial(own.apply, scale=2.0, mutable=["intermediates"]))
    (y, total), sown = together(variables, conditions, x, mask=mask)
    for i in range(4):
        one, sum_of_one = alone(variables, conditions[i], x[i : i + 1], mask=mask[i : i + 1])
        np.testing.assert_allclose(y[i], one[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(total[i], sum_of_one, rtol=1e-5, atol=1e-6)
    assert sown["intermediates"]["target"]["y"][0].shape == (4, 1, 5)
    with pytest.raises(ValueError, match=r"4 hyper-inputs for arrays \[\(4, 12\), \(3, 5\)\]"):
        own.apply(variables, conditions, x, mask=mask[:3])


def test_every_layer_of_a_stack_has_factors_of_its_own():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.scan(
                lambda module, x, _: (nn.Dense(12, name="dense")(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layer(self, x, None)[0]

    spec = hyper.spec(Stack(), X, stacked="dense/*")
    for head, kernel, bias in (("scale", (3, 1, 12), (3, 12)), ("low_rank", (3, 4), (3, 12))):
        params = jax.eval_shape(make(Stack(), spec, head=head).init, KEY, HALF, X)["params"]["network"]
        whole = params["scale"]["kernel"] if head == "scale" else params["full"]["kernel"]
        assert whole["dense"]["bias"].shape == (8, *bias)
        found = (
            params["low_rank"]["factors"]["dense"]["kernel"]["kernel"]
            if head == "low_rank"
            else whole["dense"]["kernel"]
        )
        assert found.shape == (8, *kernel)


def test_partitioned_parameters_keep_their_names():
    boxed = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b")))
    spec = hyper.spec(boxed, X)
    model = make(boxed, spec, init="zero")
    variables = jax.jit(model.init)(KEY, HALF, X)
    names = nn.get_partition_spec(variables)["params"]["target"]["kernel"]
    assert names == jax.sharding.PartitionSpec("a", "b")
    plain = boxed.init(jax.random.key(5), X)
    for given in (plain, nn.meta.unbox(plain)):
        started_from = hyper.start_from(variables, given)
        np.testing.assert_array_equal(model.apply(started_from, HALF, X), boxed.apply(plain, X))
        assert nn.get_partition_spec(started_from)["params"]["target"]["kernel"] == names


@pytest.mark.breadth  # test_a_recurrent_head_has_the_parameters_of_one_lstm_and_one_piece
def test_a_recurrent_head_starts_the_same_whatever_it_is_first_called_with():
    model = make(head="recurrent", spec=hyper.spec(NET, X, select="out/kernel"))
    init = jax.jit(model.init)
    one, other = (init(KEY, jnp.array([z]), X) for z in (0.0, 1.0))
    assert_equal(one, other)


def test_examples_cannot_share_a_changed_collection():
    net = MLP(batch_norm=True)
    model = make(net, hyper.spec(net, X), per_example=True)
    conditions = jnp.full((4, 1), 0.5)
    variables = started(model, conditions, X)
    assert jax.eval_shape(model.apply, variables, conditions, X).shape == (4, 5)
    with pytest.raises(ValueError, match="cannot update a shared 'batch_stats'"):
        model.apply(variables, conditions, X, True, mutable=["batch_stats"])


def test_low_rank_deltas_have_low_rank_and_full_ones_have_not():
    for head, most in (("low_rank", 2), ("full", 12)):
        model = make(head=head, rank=2, spec=hyper.spec(NET, X, select="dense_0/kernel"))
        variables = started(model, HALF, X)
        delta = jax.jit(model.network.apply)({"params": variables["params"]["network"]}, HALF)["dense_0/kernel"]
        assert np.linalg.matrix_rank(np.asarray(delta), tol=1e-5) == most


def test_one_chunk_of_a_leaf_is_a_full_head_on_the_trunk_of_code_and_embedding():
    spec = hyper.spec(NET, X, select="out/kernel")
    network = hyper.HyperNetwork(spec, hyper.HyperConfig(hidden=(8, 6), head="chunked", chunk_size=spec.size))
    params = jax.jit(network.init)(KEY, HALF)["params"]["chunked"]
    code = jnp.concatenate([network.config.encoding(HALF), params["chunks"][0]])
    hidden = jax.jit(Trunk(network.config).apply)({"params": params["trunk"]}, code)
    std = (network.config.gain * network.config.encoding.energy / spec.size) ** 0.5
    wanted = std * (hidden @ params["kernel"] + params["bias"]).reshape(16, 5)
    got = jax.jit(network.apply)({"params": {"chunked": params}}, HALF)["out/kernel"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.breadth  # test_one_chunk_of_a_leaf_is_a_full_head_on_the_trunk_of_code_and_embedding
def test_pieces_depend_on_the_embeddings_before_them_in_a_recurrent_head_alone():
    spec = hyper.spec(NET, X, select="dense_0/kernel")
    for head in ("chunked", "recurrent"):
        network = hyper.HyperNetwork(spec, hyper.HyperConfig(hidden=(8,), head=head, chunk_size=48))
        params = started(network, HALF)["params"]

        def pieces(chunks, head=head, params=params, network=network):
            changed = {"params": {**params, head: {**params[head], "chunks": chunks}}}
            return network.apply(changed, HALF)["dense_0/kernel"].reshape(4, 48)

        jacobian = jax.jit(jax.jacrev(pieces))(params[head]["chunks"])  # (4, 48, 4, 8)
        depends = np.abs(jacobian).max((1, 3)) > 0
        wanted = np.tri(4, dtype=bool) if head == "recurrent" else np.eye(4, dtype=bool)
        np.testing.assert_array_equal(depends, wanted)


def test_a_recurrent_head_has_the_parameters_of_one_lstm_and_one_piece():
    config = hyper.HyperConfig(hidden=(6,), head="recurrent", chunk_size=32, chunk_embedding=3)
    params = jax.eval_shape(hyper.HyperNetwork(plain_spec(), config).init, KEY, HALF)["params"]
    pieces = sum(-(-leaf.size // 32) for leaf in plain_spec())
    scales = len(plain_spec().leaves)
    lstm = 4 * 6 * ((2 + 3) + 6 + 1)  # [code; c_i], the state, a bias
    assert sum(a.size for a in jax.tree.leaves(params)) == lstm + (6 + 1) * 32 + pieces * 3 + scales


@pytest.mark.breadth  # test_every_head_generates_what_the_target_computes_with
def test_one_piece_of_a_recurrent_head_is_one_step_of_an_lstm_cell():
    spec = hyper.spec(NET, X, select="out/bias")
    network = hyper.HyperNetwork(spec, hyper.HyperConfig(hidden=(6,), head="recurrent", chunk_size=5))
    params = jax.jit(network.init)(KEY, HALF)["params"]["recurrent"]
    x = jnp.concatenate([network.config.encoding(HALF), params["chunks"][0]])
    _, hidden = nn.OptimizedLSTMCell(6).apply({"params": params["lstm"]}, (jnp.zeros(6), jnp.zeros(6)), x)
    std = (network.config.gain * network.config.encoding.energy / 5) ** 0.5
    wanted = std * (hidden @ params["kernel"] + params["bias"])
    np.testing.assert_allclose(network.apply({"params": {"recurrent": params}}, HALF)["out/bias"], wanted, rtol=1e-5)


def test_a_factor_of_one_changes_nothing_and_others_scale_columns():
    model = make(head="scale", spec=hyper.spec(NET, X, select="dense_0/kernel"))
    variables = started(model, HALF, X)
    none = jax.tree.map(jnp.zeros_like, variables["params"]["network"])
    plain = {"params": variables["params"]["target"]}
    assert_equal(model.apply({"params": {**variables["params"], "network": none}}, HALF, X), NET.apply(plain, X))
    kernel = model.apply(variables, HALF, method="generate")["dense_0"]["kernel"]
    ratio = np.asarray(kernel / plain["params"]["dense_0"]["kernel"])
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)
    assert ratio.std() > 0.01


@pytest.mark.breadth  # test_every_head_generates_what_the_target_computes_with
def test_complex_parameters_are_generated():
    class Complex(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = lambda key: jax.lax.complex(*jax.random.normal(key, (2, 12, 3)))
            return jnp.abs(x @ self.param("poles", init))

    spec = hyper.spec(Complex(), X, draws=200)
    assert abs(spec["poles"].variance - 1) < 0.1
    for residual in (True, False):
        model = make(Complex(), spec, residual=residual, init="matched")
        variables = jax.jit(model.init)(KEY, HALF, X)
        poles = hyper.bind(model, variables, HALF)["params"]["poles"]
        assert poles.dtype == jnp.complex64
        assert min(poles.real.std(), poles.imag.std()) > 0.1


def test_generated_leaves_have_the_asked_dtype_and_theta0_keeps_its_own():
    model = make(dtype="bfloat16")
    variables = jax.eval_shape(model.init, KEY, HALF, X)
    bound = jax.eval_shape(lambda variables: hyper.bind(model, variables, HALF), variables)
    assert {a.dtype for a in jax.tree.leaves(bound)} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.breadth  # test_every_head_generates_what_the_target_computes_with
def test_a_hypernetwork_of_a_hypernetwork():
    inner = make(spec=hyper.spec(NET, X, select="out/*"))
    spec = hyper.spec(inner, HALF, X, select="network/trunk/*/kernel")
    outer = hyper.Hyper(inner, hyper.mip(spec))
    variables = started(outer, jnp.array([0.2]), HALF, X)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(outer.apply(v, jnp.array([0.2]), HALF, X))))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["params"]["network"]["full"]["kernel"]["network"]["trunk"]["hidden_0"]["kernel"])


def test_task_embeddings_condition_a_target():
    encoding = hyper.Encoding("embedding", tasks=3, size=4)
    model = make(encoding=encoding)
    variables = started(model, jnp.array([0]), X)
    apply = jax.jit(model.apply)
    outs = [apply(variables, jnp.array([task]), X) for task in range(3)]
    assert min(np.abs(outs[i] - outs[i - 1]).max() for i in range(3)) > 1e-3
    with pytest.raises(ValueError, match="outside its range"):
        model.apply(variables, jnp.array([3]), X)
    with pytest.raises(ValueError, match="tasks are whole numbers"):
        model.apply(variables, jnp.array([1.5]), X)


def test_heads_by_pattern_and_a_pattern_that_matches_nothing():
    model = make(heads=(("**/bias", "full"), ("out/*", "chunked")), head="low_rank")
    groups = {kind: {leaf.path for leaf in leaves} for kind, leaves in model.network.groups().items()}
    assert groups["chunked"] == {"out/kernel", "out/bias"}
    assert groups["full"] == {"dense_0/bias", "dense_1/bias"}
    assert groups["low_rank"] == {"dense_0/kernel", "dense_1/kernel"}
    with pytest.raises(ValueError, match=r"heads='gau/\*' matches no parameter"):
        make(heads=(("gau/*", "full"),)).init(KEY, HALF, X)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: make().init(KEY, jnp.zeros(2), X), r"hyper-input of shape \(2,\): its last axis must have 1"),
        (lambda: make().init(KEY, jnp.array([1.5]), X), r"\[1\.5\] is outside its range 0\.0\.\.1\.0"),
        (lambda: make().init(KEY, jnp.zeros((4, 1)), X), "expected 1 axes"),
        (lambda: make(per_example=True).init(KEY, jnp.zeros((3, 1)), X), r"3 hyper-inputs for arrays \[\(4, 12\)\]"),
        (
            lambda: make(MLP((8,))).init(KEY, HALF, X),
            r"dense_0/bias \(16,\) is to be generated, but the target has \(8,\)",
        ),
        (
            lambda: make(residual=False, init="matched", spec=hyper.spec(NET, X)).init(KEY, HALF, X),
            r"dense_0/bias wants the variance .* spec\(\.\.\., draws=64\)",
        ),
        (lambda: make(residual=False, init="zero"), "zero' without residual"),
        (lambda: make(hidden=()), "one or more widths"),
        (
            lambda: hyper.start_from(started(make(), HALF, X), unconditioned(MLP((8, 16)))),
            r"dense_0/bias is float32\[8\], not float32\[16\]",
        ),
        (
            lambda: hyper.start_from(started(make(residual=False), HALF, X), unconditioned(NET)),
            "of the target to initialise: use residual=True",
        ),
        (lambda: make(dtype="int32"), "dtype='int32': must be one of"),
        (lambda: make(target_gain=-1.0), "target_gain=-1.0: must be positive"),
        (lambda: make(negative_slope=float("nan")), "negative_slope=nan"),
    ],
)
def test_errors_name_what_is_wrong(run, message):
    with pytest.raises(ValueError, match=message):
        run()
