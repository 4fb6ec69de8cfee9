"""Sparse modular activation around modules of a user's own, and what every option of the router does."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like, vanishing

from seqboat.layers import credit, execution
from seqboat.layers.feed_forward import FeedForward
from seqboat.layers.gau import GatedAttentionUnit
from seqboat.layers.router import LatentConfigurator, RouterConfig
from seqboat.layers.seqboat import LayerConfig
from seqboat.layers.sparse_activation import SparseModularActivation
from seqboat.layers.windowed import WindowedModule
from seqboat.ops.window import Window

D, BATCH, LENGTH = 8, 2, 9
F32 = jnp.dtype(jnp.float32)
VALID = jnp.asarray(np.arange(LENGTH)[None] < np.array([9, 6])[:, None])


class Scale(nn.Module):
    """A user's row-wise module."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x * self.param("scale", nn.initializers.ones, (D,))[None])


class NeighbourMean(WindowedModule):
    """A user's windowed module: the mean of a row and the activated row before it, projected."""

    def setup(self):
        self.dense = nn.Dense(D, name="dense")

    def halo(self, length):
        return 1, 0

    def context(self, x, rows):
        return {"y": self.dense(x)}

    def mix(self, x, halo, rows, halo_rows):
        near = jnp.abs(rows.rank[:, None] - halo_rows.rank[None]) * 2 - 1 + (halo_rows.rank[None] > rows.rank[:, None])
        see = (rows.segment[:, None] == halo_rows.segment[None]) & halo_rows.active[None] & (near <= 1)
        see = jnp.where(see, 1.0, 0.0)
        return x + see @ halo["y"] / jnp.maximum(see.sum(1, keepdims=True), 1)


def gau(name="gau", position="relative", **fields):
    return GatedAttentionUnit(D, 4, 6, Window(2, True, "softmax", position), 8, dtype=F32, name=name, **fields)


def make(modules, **fields):
    return SparseModularActivation(modules, block_size=4, **fields)


def initial(layer):
    return random_like(jax.eval_shape(layer.init, jax.random.key(0), normal(0, BATCH, LENGTH, D), VALID))


OWN = {
    "row-wise": (Scale(name="own"),),
    "windowed": (NeighbourMean(name="near"),),
    "three": (Scale(name="own"), NeighbourMean(name="near"), FeedForward(5, dtype=F32, name="feed_forward")),
    "beside attention": (gau(), NeighbourMean(name="near")),
}


@pytest.mark.breadth  # test_own_modules.py
@pytest.mark.parametrize("name", grid(tuple(OWN), "three"))
def test_modules_of_a_users_own_run_packed_as_they_run_dense(name):
    modules = OWN[name]
    variables, m, cotangent = initial(make(modules)), normal(0, BATCH, LENGTH, D), normal(1, BATCH, LENGTH, D)
    cotangent = jnp.where(VALID[..., None], cotangent, 0)

    def run(form, blocks=1):
        def scalar(params, m):
            y, stats = make(modules, form=form, blocks_per_iteration=blocks).apply({"params": params}, m, VALID)
            return jnp.vdot(y, cotangent), (y[VALID], stats)

        return jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(variables["params"], m)

    (gradients, (y, stats)), expected = run("packed"), run("dense")
    assert all(0 < int(count) < 15 for count in stats.active)
    assert_close((y, stats), expected[1])
    assert_close(gradients, expected[0], floor=vanishing(expected[0]))
    assert_close(run("packed", blocks=3), expected, floor=vanishing(expected[0]))
    assert set(variables["params"]) == {"configurator", *(module.name for module in modules)}


def test_result_is_the_sum_of_active_modules_times_confidence():
    modules = OWN["three"][::2]
    variables, m = initial(make(modules)), normal(0, BATCH, LENGTH, D)
    y, stats = jax.jit(make(modules).apply)(variables, m, VALID)
    configurator = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["configurator"])
    temperature = np.exp(configurator["log_temperature"])
    logits = np.asarray(m) @ configurator["logits"]["kernel"] + configurator["logits"]["bias"]
    margin = logits[..., 1::2] - logits[..., ::2]
    probability = 1 / (1 + np.exp(-margin / temperature))
    real = np.asarray(VALID)[..., None]
    gate = np.where((margin > 0) & real, np.maximum(probability, 1 - probability), 0)
    expected = 0
    for i, module in enumerate(modules):
        result = jax.jit(module.apply)({"params": variables["params"][module.name]}, m.reshape(-1, D))
        expected = expected + gate[..., i, None] * np.asarray(result).reshape(m.shape)
    assert_close(y, expected)
    assert_close(stats.active, ((margin > 0) & real).sum((0, 1)).astype(float))
    assert_close(stats.confidence, gate.sum((0, 1)))
    assert_close(stats.probability, (probability * real).sum((0, 1)))
    assert stats.elements == VALID.sum()
    assert_close(stats.temperature, temperature)


@pytest.mark.breadth  # test_result_is_the_sum_of_active_modules_times_confidence: the statistics are sums
def test_statistics_are_sums_over_real_elements_and_so_add_up_over_batches():
    layer = make(OWN["row-wise"])
    variables, m = initial(layer), normal(0, BATCH, LENGTH, D)
    run = jax.jit(layer.apply)
    whole = run(variables, m, VALID)[1]
    parts = [run(variables, m[i : i + 1], VALID[i : i + 1])[1] for i in range(BATCH)]
    for name in ("active", "confidence", "probability", "elements"):
        assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_always_and_no_module_have_no_configurator():
    m = normal(0, BATCH, LENGTH, D)
    always = make(OWN["row-wise"], activation="always", form="dense")
    variables = initial(always)
    assert set(variables["params"]) == {"own"}
    y, stats = jax.jit(always.apply)(variables, m, VALID)
    assert_close(y, jnp.where(VALID[..., None], jnp.tanh(m * variables["params"]["own"]["scale"][None, None]), 0))
    assert stats.active == stats.confidence == stats.probability == stats.elements == 15
    never = make(())
    assert initial(never) == {}
    y, stats = never.apply({}, m, VALID)
    assert not np.asarray(y).any()
    assert stats.active.shape == stats.temperature.shape == (0,)


# The configurator alone.


def configure(router, m, variables, train=False, valid=VALID):
    module = LatentConfigurator(1, router)
    return module.apply(variables, m, valid, train, mutable=["batch_stats"])


def any_variables(router):
    init = functools.partial(LatentConfigurator(1, router).init, train=False)
    return random_like(jax.eval_shape(init, jax.random.key(0), normal(0, BATCH, LENGTH, D), VALID))


def test_temperature_starts_at_its_scale_times_the_root_of_the_width_and_bias_opens():
    m = normal(0, BATCH, LENGTH, D)
    router = RouterConfig(temperature_scale=0.5, initial_bias=4.0)
    start = lambda router: LatentConfigurator(2, router).init_with_output(jax.random.key(0), m, VALID, False)
    start = jax.jit(start, static_argnums=0)
    decision, variables = start(router)
    assert_close(decision.temperature, np.full(2, 0.5 * np.sqrt(D)))
    assert variables["params"]["logits"]["bias"].tolist() == [0, 4, 0, 4]
    assert np.asarray(decision.active).sum() == 2 * 15
    assert not np.asarray(start(RouterConfig(initial_bias=-4.0))[0].active).any()


def test_a_tie_is_inactive_and_temperature_never_decides():
    m, router = normal(0, BATCH, LENGTH, D), RouterConfig()
    logits = {"kernel": jnp.zeros((D, 2)), "bias": jnp.zeros(2)}
    tie, _ = configure(router, m, {"params": {"logits": logits, "log_temperature": jnp.zeros(1)}})
    assert not np.asarray(tie.active).any()
    assert_close(tie.confidence, np.full((BATCH, LENGTH, 1), 0.5))
    logits = {"kernel": normal(1, D, 2), "bias": jnp.zeros(2)}
    cold, warm = (
        configure(router, m, {"params": {"logits": logits, "log_temperature": jnp.full(1, t)}})[0] for t in (-2.0, 2.0)
    )
    assert np.array_equal(cold.active, warm.active)
    assert (np.asarray(cold.confidence) > np.asarray(warm.confidence)).all()


def test_centred_input_uses_the_mean_of_previous_training_batches_alone():
    router = RouterConfig(centered=True)
    variables = {**any_variables(router), "batch_stats": {"mean": jnp.zeros(D), "batches": jnp.zeros(())}}
    plain = {"params": variables["params"]}
    real, means = np.asarray(VALID), []
    for step in range(3):
        m = normal(step, BATCH, LENGTH, D) + 3
        before = variables["batch_stats"]["mean"]
        assert_close(before, np.mean(means, 0) if means else np.zeros(D))
        decision, changed = configure(router, m, variables, train=True)
        assert_close(decision, configure(RouterConfig(), m - before[None, None], plain)[0])
        frozen, unchanged = configure(router, m, variables, train=False)
        assert_close(frozen, decision)
        assert_close(unchanged["batch_stats"], variables["batch_stats"])
        # Padding is not counted: other numbers there leave the same mean.
        noisy = configure(router, jnp.where(VALID[..., None], m, 1e3), variables, train=True)[1]
        assert_close(noisy["batch_stats"], changed["batch_stats"])
        means.append(np.asarray(m, np.float64)[real].mean(0))
        variables = {**variables, **changed}


def test_centred_decisions_do_not_depend_on_batch_mates():
    router = RouterConfig(centered=True)
    variables, m = any_variables(router), normal(0, BATCH, LENGTH, D)
    other = m.at[1].set(7 * normal(1, LENGTH, D))
    for train in (True, False):
        first, second = (configure(router, x, variables, train)[0] for x in (m, other))
        assert_close(jax.tree.map(lambda a: a[:1], first[:3]), jax.tree.map(lambda a: a[:1], second[:3]))


def test_the_running_mean_becomes_exponential_after_a_hundred_batches():
    variables = {
        "params": {"logits": {"kernel": jnp.zeros((D, 2)), "bias": jnp.zeros(2)}, "log_temperature": jnp.zeros(1)},
        "batch_stats": {"mean": jnp.ones(D), "batches": jnp.asarray(1000.0)},
    }
    _, changed = configure(RouterConfig(centered=True), 2 * jnp.ones((BATCH, LENGTH, D)), variables, train=True)
    assert_close(changed["batch_stats"], {"mean": np.full(D, 1.01), "batches": np.float32(1001)})


# How training reaches the configurator.


def logit_gradients(router, train=True, seed=0, form="packed", lean=0.0):
    """d loss / d (logit of every element), and (y, active): a channel that the router alone reads shifts the logits."""
    run = compiled_logit_gradients(router, train, form, lean, credit.CREDIT_HALO_FACTOR)
    m, cotangent = normal(0, BATCH, LENGTH, D), normal(1, BATCH, LENGTH, D)
    gradient, (y, active, _) = run(jnp.zeros((BATCH, LENGTH)), jax.random.key(seed), m, cotangent)
    return gradient, (y, active)


@functools.cache
def compiled_logit_gradients(router, train, form, lean, halo_factor, window=gau().window):
    assert halo_factor == credit.CREDIT_HALO_FACTOR
    params = initial(make((gau(),)))["params"]
    kernel = jnp.concatenate([params["configurator"]["logits"]["kernel"], jnp.array([[0.0, 1.0]])])
    logits = {"kernel": kernel, "bias": params["configurator"]["logits"]["bias"] + jnp.array([0.0, lean])}
    params = {"gau": params["gau"], "configurator": {**params["configurator"], "logits": logits}}
    narrow = Narrow(D, 4, 6, window, 8, dtype=F32, name="gau")
    layer = make((narrow,), router=router, form=form)

    def scalar(shift, key, m, cotangent):
        wide = jnp.concatenate([m, shift[..., None]], -1)
        (y, _), changed = layer.apply({"params": params}, wide, VALID, train, mutable=["taps"], rngs={"dropout": key})
        active, confidence = (changed["taps"][name][..., 0] for name in ("active", "confidence"))
        return jnp.vdot(y[..., :D], cotangent), (y[..., :D], active, confidence)

    return jax.jit(jax.grad(scalar, has_aux=True))


class Narrow(GatedAttentionUnit):
    """Attention that does not see the last channel."""

    def mixes_packed(self, every):
        return False

    def context(self, x, rows):
        return super().context(x[:, :-1], rows)

    def mix(self, x, halo, rows, halo_rows):
        return jnp.pad(super().mix(x[:, :-1], halo, rows, halo_rows), ((0, 0), (0, 1)))


PUBLISHED = RouterConfig()
STRAIGHT = RouterConfig(straight_through=True)
CREDIT = RouterConfig(key_credit=True)


def test_the_published_router_hears_nothing_from_inactive_elements():
    gradient, (_, active) = logit_gradients(PUBLISHED, form="dense")  # compiles sooner, as in the next test
    active = np.asarray(active)
    assert 0 < active.sum() < 15
    assert (np.asarray(gradient)[active] != 0).all()
    assert (np.asarray(gradient)[~active] == 0).all()


@pytest.mark.breadth  # test_a_share_pays_some_inactive_elements_and_changes_no_value
def test_straight_through_hears_inactive_elements_and_changes_no_value():
    gradient, (y, active) = logit_gradients(STRAIGHT)
    published, (expected, _) = logit_gradients(PUBLISHED)
    assert_close(y, expected)
    real, active = np.asarray(VALID), np.asarray(active)
    assert (np.asarray(gradient)[real & ~active] != 0).all()
    assert not np.asarray(gradient)[~real].any(), "padding is not an element"
    assert_close(gradient[active], published[active])
    evaluated, _ = logit_gradients(STRAIGHT, train=False)
    assert_close(evaluated, logit_gradients(PUBLISHED, train=False)[0])


# test_credit_with_eviction_cost_is_what_switching_one_element_changes_for_others; test_own_modules.py: credit
@pytest.mark.parametrize("straight_through", grid((False, True)))
def test_key_credit_pays_for_being_read_and_changes_no_value(straight_through):
    with_credit = dataclasses.replace(CREDIT, straight_through=straight_through)
    without = dataclasses.replace(PUBLISHED, straight_through=straight_through)
    gradient, (y, active) = logit_gradients(with_credit)
    plain, (expected, _) = logit_gradients(without)
    assert_close(y, expected)
    active = np.asarray(active)
    assert np.abs(np.asarray(gradient - plain))[active].max() > 1e-4
    assert_close(logit_gradients(with_credit, train=False)[0], logit_gradients(without, train=False)[0])


BOTH = RouterConfig(straight_through=True, key_credit=True)


def test_a_share_pays_some_inactive_elements_and_changes_no_value():
    """Which of them hear something depends on the key; active elements hear what they always did."""
    published, (expected, active) = logit_gradients(PUBLISHED, form="dense")
    active, real = np.asarray(active), np.asarray(VALID)
    heard = []
    for seed in range(3):
        gradient, (y, _) = logit_gradients(dataclasses.replace(STRAIGHT, credit_share=0.5), seed=seed, form="dense")
        assert_close(y, expected)
        assert_close(np.asarray(gradient)[active], np.asarray(published)[active])
        heard.append(np.asarray(gradient) != 0)
        assert 0 < (heard[-1] & ~active).sum() < (real & ~active).sum()
    assert (heard[0] != heard[1]).any()


@pytest.mark.breadth  # test_a_share_pays_some_inactive_elements_and_changes_no_value
def test_shares_pay_as_the_whole_on_average():
    """An element's own pay does not depend on who else is drawn: its mean over keys is the whole pay."""
    whole, (_, active) = logit_gradients(STRAIGHT)
    drawn = [logit_gradients(dataclasses.replace(STRAIGHT, credit_share=0.5), seed=seed)[0] for seed in range(12)]
    inactive = np.asarray(VALID) & ~np.asarray(active)
    for place in zip(*np.nonzero(inactive), strict=True):
        paid = [float(gradient[place]) for gradient in drawn if gradient[place] != 0]
        assert paid
        np.testing.assert_allclose(paid, 2 * float(whole[place]), rtol=1e-4)


@pytest.mark.breadth  # test_a_share_pays_some_inactive_elements_and_changes_no_value
def test_credit_on_the_first_half_of_a_batch_is_twice_that_of_the_whole():
    published, (expected, _) = logit_gradients(PUBLISHED)
    whole, _ = logit_gradients(BOTH)
    half, (y, _) = logit_gradients(dataclasses.replace(BOTH, credit_sequences=0.5))
    assert_close(y, expected)
    share = np.array([2.0, 0.0])[:, None]
    assert np.abs(np.asarray(whole - published)[0]).max() > 1e-3
    assert_close(half - published, share * np.asarray(whole - published))


@pytest.mark.breadth
@pytest.mark.parametrize("router", [STRAIGHT, BOTH])
@pytest.mark.parametrize("lean", [-0.5, 0.0])
def test_packed_credit_with_a_long_reach_is_that_of_the_masked_form(router, lean, monkeypatch):
    """The reach is what tells them apart: where few elements are active, the usual one leaves far neighbours out."""
    monkeypatch.setattr(credit, "CREDIT_HALO_FACTOR", LENGTH)
    packed, dense = (logit_gradients(router, form=form, lean=lean)[0] for form in ("packed", "dense"))
    assert_close(packed, dense)


EVICTING = dataclasses.replace(BOTH, eviction_cost=True)
WINDOWS = {
    "packed": ("packed", gau().window),
    "dense": ("dense", gau().window),
    "both directions": ("packed", Window(1, False, "softmax", "relative")),
    "both directions, laplace": ("dense", Window(2, False, "laplace", "relative")),
    "relu2": ("packed", Window(1, True, "relu2", "none")),
}


def evicting(case, monkeypatch):
    """`compiled_logit_gradients` with all that EVICTING pays, and arguments for it."""
    monkeypatch.setattr(credit, "CREDIT_HALO_FACTOR", LENGTH)
    form, window = WINDOWS[case]
    run = compiled_logit_gradients(EVICTING, True, form, 0.0, LENGTH, window)
    return run, jnp.zeros((BATCH, LENGTH)), normal(0, BATCH, LENGTH, D), normal(1, BATCH, LENGTH, D)


@pytest.mark.parametrize("case", grid(tuple(WINDOWS), "packed"))
def test_credit_with_eviction_cost_is_what_switching_one_element_changes_for_others(case, monkeypatch):
    """For the element's own result, which has its confidence, the cotangent is zero."""
    run, zero, m, cotangent = evicting(case, monkeypatch)
    temperature = jnp.exp(initial(make((gau(),)))["params"]["configurator"]["log_temperature"])[None]
    paid, changes = [], []
    for place in range(LENGTH):
        others = cotangent.at[:, place].set(0)
        gradient, (y, active, confidence) = run(zero, jax.random.key(0), m, others)
        flipped = zero.at[:, place].set(jnp.where(active[:, place], -100, 100))
        after = run(flipped, jax.random.key(0), m, others)[1][0]
        change = jnp.where(active[:, place], 1, -1) * ((y - after) * others).sum((1, 2))
        changes.append(change * (confidence * (1 - confidence) / temperature)[:, place])
        paid.append(gradient[:, place])
    paid, changes = (np.stack(values, 1)[np.asarray(VALID)] for values in (paid, changes))
    assert min((changes[np.asarray(active)[VALID]] != 0).sum(), (changes[~np.asarray(active)[VALID]] != 0).sum()) > 2
    assert_close(paid, changes)


@pytest.mark.breadth  # test_credit_with_eviction_cost_is_what_switching_one_element_changes_for_others
def test_eviction_cost_changes_credit_and_no_value(monkeypatch):
    run, zero, m, cotangent = evicting("packed", monkeypatch)
    gradient, (y, active, _) = run(zero, jax.random.key(0), m, cotangent)
    free, (expected, _) = logit_gradients(BOTH)
    assert_close(y, expected)
    assert np.abs(np.asarray(gradient - free))[np.asarray(active)].max() > 1e-4


def test_eviction_cost_is_causal_and_independent_of_batch_mates(monkeypatch):
    run, zero, m, cotangent = evicting("packed", monkeypatch)
    key, early = jax.random.key(0), jnp.arange(LENGTH) < 5
    past = jnp.where(early[None, :, None], cotangent, 0)
    later = jnp.where(early[None, :, None], m, normal(2, BATCH, LENGTH, D))
    assert_close(run(zero, key, later, past)[0][:, :5], run(zero, key, m, past)[0][:, :5])
    assert_close(run(zero, key, m.at[1].set(later[1, ::-1]), cotangent)[0][0], run(zero, key, m, cotangent)[0][0])


def test_eviction_cost_needs_key_credit_and_a_window():
    with pytest.raises(ValueError, match="eviction_cost=True needs key_credit=True"):
        RouterConfig(eviction_cost=True)
    with pytest.raises(ValueError, match="eviction_cost=True needs a window_size: without a window no key is evicted"):
        LayerConfig(4, 2, 4, window_size=None, router=EVICTING)
    layer = make((gau().clone(window=Window(None, True, "softmax", "relative")),), router=EVICTING)
    run = functools.partial(layer.apply, initial(layer), rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match="without a window size no key is evicted"):
        jax.eval_shape(lambda m: run(m, VALID, True), normal(0, BATCH, LENGTH, D))


# Modules that may not, and randomness.


@pytest.mark.parametrize("module", [FeedForward(5), GatedAttentionUnit(D, 4, 6, Window(2, True, "softmax", "none"), 8)])
def test_defaults_satisfy_their_annotations(module):
    """A user who leaves `dtype` at its default passes the type checks, which see it when a layer clones the module."""
    variables = initial(make((module.clone(name="module"),)))
    assert "module" in variables["params"]


class Counter(nn.Module):
    """A module with a state of its own, which packed execution could not keep."""

    @nn.compact
    def __call__(self, x):
        return x + self.variable("batch_stats", "calls", jnp.zeros, ()).value


def test_a_module_with_other_collections_than_parameters_is_refused():
    with pytest.raises(ValueError, match=r"parameters only; counter has \['batch_stats'\]"):
        initial(make((Counter(name="counter"),)))


DROPPING = {
    "feed-forward": FeedForward(16, 0.5, F32, name="module"),
    "values": gau("module", hidden_dropout=0.5),
    "attention": gau("module", attention_dropout=0.5),
}


@pytest.mark.parametrize("module", grid(DROPPING, "attention"))
def test_dropout_follows_its_key_and_is_off_without_training(module):
    layer = make((module,), activation="always", form="dense")  # packed: the two tests of dropout below
    variables, m = initial(layer), normal(0, BATCH, LENGTH, D)

    @jax.jit
    def run(key):
        trained, evaluated = (
            layer.apply(variables, m, VALID, train, rngs={"dropout": key})[0] for train in (True, False)
        )
        return trained, evaluated, layer.apply(variables, m, VALID)[0]

    (first, evaluated, plain), (again, *_), (other, evaluated_by_another, _) = (
        run(jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first - other)).max() > 1e-3
    np.testing.assert_array_equal(evaluated, evaluated_by_another)
    assert_close(evaluated, plain)
    assert np.abs(np.asarray(first - evaluated)).max() > 1e-3


class Dropping(nn.Module):
    """Rows with half of their numbers dropped: linear, given the key."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (D,))
        return nn.Dropout(0.5)(x, deterministic=not self.has_rng("dropout")) * scale[None]


def test_dropout_in_the_backward_pass_is_that_of_the_forward_pass():
    """The recomputed blocks of the gradient draw the same numbers: f(m) = <gradient of f, m> for a linear f."""
    layer = make((Dropping(name="module"),), activation="always")
    variables, m, cotangent = initial(layer), normal(0, BATCH, LENGTH, D), normal(1, BATCH, LENGTH, D)

    def value(m):
        rngs = {"dropout": jax.random.key(0)}
        return jnp.vdot(layer.apply(variables, m, VALID, True, rngs=rngs)[0], cotangent)

    result, gradient = jax.jit(jax.value_and_grad(value))(m)
    assert 0 < (np.asarray(gradient)[np.asarray(VALID)] == 0).mean() < 1
    assert_close(jnp.vdot(gradient, m), result)


def test_packed_blocks_draw_different_numbers():
    """Rows of ones in blocks of four: no two blocks drop the same."""
    layer = make((FeedForward(16, 0.5, F32, name="module"),), activation="always")
    variables, rngs = initial(layer), {"dropout": jax.random.key(0)}
    run = jax.jit(lambda m, valid: layer.apply(variables, m, valid, True, rngs=rngs)[0])
    y = run(jnp.ones((1, 16, D)), jnp.ones((1, 16), bool))
    blocks = np.asarray(y).reshape(4, -1)
    assert len({block.tobytes() for block in blocks}) == 4


@pytest.mark.parametrize("form", grid(("packed", "dense"), "packed"))
def test_nan_in_padding_reaches_no_real_element(form):
    """Keys and values of rows that may not be read are zeroed where they are made."""
    layer, m = make((gau(),), form=form), normal(0, BATCH, LENGTH, D)
    variables = initial(layer)
    run = jax.jit(lambda m: layer.apply(variables, m, VALID)[0][VALID])
    clean = run(jnp.where(VALID[..., None], m, 0))
    assert np.asarray(clean).any()
    np.testing.assert_array_equal(run(jnp.where(VALID[..., None], m, jnp.nan)), clean)


# test_capacity_is_rounded_to_no_more_than_a_trip
@pytest.mark.parametrize("size", grid((100_000, 10**9)))
def test_blocks_are_no_larger_than_all_rows(size):
    """And one tile of a kernel, 128: a block of the size that is asked for would not fit into memory."""
    modules = (gau(), FeedForward(5, dtype=F32, name="feed_forward"))
    m = normal(0, BATCH, LENGTH, D)
    variables = initial(make(modules))
    large = SparseModularActivation(modules, block_size=size, blocks_per_iteration=10**9)
    assert_close(jax.jit(large.apply)(variables, m, VALID), jax.jit(make(modules).apply)(variables, m, VALID))


@pytest.mark.parametrize("field", ["block_size", "blocks_per_iteration"])
def test_blocks_have_a_size(field):
    with pytest.raises(ValueError, match=f"{field}=0: must be at least 1"):
        SparseModularActivation((), **{field: 0})


@pytest.mark.parametrize(("blocks", "rows"), [(1, 16), (3, 12), (32, 20)])
def test_capacity_is_rounded_to_no_more_than_a_trip(blocks, rows, monkeypatch):
    """18 elements are five blocks of four: projected four at once if mixed one by one, else as many as a trip has."""
    packed, pack = [], execution.pack
    monkeypatch.setattr(execution, "pack", lambda *args, **sides: packed.append(args[1]) or pack(*args, **sides))
    layer = make((NeighbourMean(name="near"),), blocks_per_iteration=blocks)
    jax.eval_shape(layer.apply, initial(layer), normal(0, BATCH, LENGTH, D), VALID)
    assert packed == [rows]
