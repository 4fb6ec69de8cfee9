"""Optimisers against the published update rules written in plain numpy; schedules; groups of parameters by path."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.errors import UserError
from experiments.training.optimizers import CLIP_EPSILON, OptimizerConfig, by_path, learning_rate, make_optimizer
from tests.helpers import grid

STEPS = 20
CONFIG = OptimizerConfig(
    learning_rate=0.05, warmup_steps=4, warmup_start=1e-3, weight_decay=0.1, epsilon=1e-2, clip_norm=1e9
)
PARAMS = {"layer": {"kernel": np.full((3, 2), 0.5), "bias": np.array([0.3, -0.2])}, "head": np.array([1.0, -1.0, 2.0])}


def gradients_of(steps: int) -> list[dict]:
    """Gradients that differ in size from step to step, so that moments, clipping and epsilon all matter."""
    random = np.random.default_rng(0)
    return [jax.tree.map(lambda p: random.normal(size=p.shape) * 10 ** random.uniform(-2, 1), PARAMS)] + [
        jax.tree.map(lambda p: random.normal(size=p.shape) * 0.3, PARAMS) for _ in range(steps - 1)
    ]


def published_rate(config: OptimizerConfig, t: float, steps: int) -> float:
    """fairseq's linear_decay_schedule.py; the cosine is half a period from the peak to the end."""
    start, peak, end, warm = config.warmup_start, config.learning_rate, config.final_learning_rate, config.warmup_steps
    if warm and t <= warm:
        return start + t**config.warmup_power * (peak - start) / warm**config.warmup_power
    if t >= steps:
        return end
    if config.schedule == "cosine":
        return end + (peak - end) * (1 + math.cos(math.pi * (t - warm) / (steps - warm))) / 2
    return end + (peak - end) * (steps - t) / (steps - warm)


def published_run(config: OptimizerConfig, gradients: list[dict]) -> list[dict]:
    """fairseq's adam.py and radam.py (degenerated to SGD), in float64: parameters after each step."""
    params = jax.tree.map(np.copy, PARAMS)
    leaves, structure = jax.tree.flatten(params)
    first, second = ([np.zeros_like(p) for p in leaves] for _ in range(2))
    b1, b2 = config.b1, config.b2
    trajectory = []
    for t, tree in enumerate(gradients, start=1):
        flat = jax.tree.leaves(tree)
        norm = math.sqrt(sum(float((g**2).sum()) for g in flat))
        factor = min(1.0, config.clip_norm / (norm + 1e-6))
        rate = published_rate(config, t - 1, STEPS)
        for i, gradient in enumerate(flat):
            g = gradient * factor
            first[i] = b1 * first[i] + (1 - b1) * g
            second[i] = b2 * second[i] + (1 - b2) * g**2
            leaves[i] = leaves[i] - rate * config.weight_decay * leaves[i]
            denominator = np.sqrt(second[i]) + config.epsilon
            if config.name == "adamw":
                leaves[i] = leaves[i] - rate * math.sqrt(1 - b2**t) / (1 - b1**t) * first[i] / denominator
                continue
            most = 2 / (1 - b2) - 1
            now = most - 2 * t * b2**t / (1 - b2**t)
            if now >= 5:
                rectified = math.sqrt((1 - b2**t) * (now - 4) / (most - 4) * (now - 2) / now * most / (most - 2)) / (
                    1 - b1**t
                )
                leaves[i] = leaves[i] - rate * rectified * first[i] / denominator
            else:
                leaves[i] = leaves[i] - rate / (1 - b1**t) * first[i]
        trajectory.append(jax.tree.unflatten(structure, list(leaves)))
    return trajectory


def run(config: OptimizerConfig, gradients: list[dict], params: dict = PARAMS) -> list[dict]:
    params = jax.tree.map(jnp.asarray, params)
    optimizer = make_optimizer(config, STEPS, params)
    state, trajectory = optimizer.init(params), []
    for tree in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, tree), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        trajectory.append(params)
    return trajectory


def assert_close(actual: list[dict], expected: list[dict]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-7), ours, theirs)


@pytest.mark.parametrize(
    ("name", "clip_norm"), grid(list(itertools.product(["adamw", "radam"], [1e9, 0.5])), ("adamw", 0.5), ("radam", 1e9))
)
def test_the_published_update(name, clip_norm):
    config = dataclasses.replace(CONFIG, name=name, clip_norm=clip_norm)
    gradients = gradients_of(12)
    assert_close(run(config, gradients), published_run(config, gradients))


def test_the_reference_tells_the_usual_mistakes_apart():
    """Epsilon beside the corrected second moment, and a decay coupled to the gradient, are other trajectories."""
    gradients = gradients_of(12)
    last = jax.tree.leaves(published_run(CONFIG, gradients)[-1])
    small = jax.tree.leaves(published_run(dataclasses.replace(CONFIG, epsilon=1e-8), gradients)[-1])
    undecayed = jax.tree.leaves(published_run(dataclasses.replace(CONFIG, weight_decay=0.0), gradients)[-1])
    for other in (small, undecayed):
        assert max(float(abs(a / b - 1).max()) for a, b in zip(last, other, strict=True)) > 1e-2


def test_radam_is_momentum_until_its_rate_has_five_degrees_of_freedom():
    config = dataclasses.replace(CONFIG, name="radam", warmup_steps=0, weight_decay=0.0, schedule="linear")
    ones = [jax.tree.map(lambda p: np.full(p.shape, 0.01), PARAMS)] * 8
    trajectory = [PARAMS, *run(config, ones)]
    moved = [float(a["head"][0] - b["head"][0]) for a, b in itertools.pairwise(trajectory)]
    rates = [published_rate(config, t, STEPS) for t in range(8)]
    # Of a constant gradient g, momentum is exactly g.
    plain = [abs(step / rate / 0.01 - 1) < 1e-3 for step, rate in zip(moved, rates, strict=True)]
    assert plain == [True] * 5 + [False] * 3


def test_an_empty_gradient_only_decays():
    zeros = [jax.tree.map(np.zeros_like, PARAMS)]
    (moved,) = run(CONFIG, zeros)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old * (1 - CONFIG.warmup_start * 0.1), rtol=1e-6),
        moved,
        PARAMS,
    )


def test_clipping_is_by_the_global_norm():
    config = dataclasses.replace(CONFIG, name="radam", clip_norm=1.0, weight_decay=0.0, warmup_steps=0)
    gradient = jax.tree.map(lambda p: np.full(p.shape, 3.0), PARAMS)
    (clipped,) = run(config, [gradient])
    moved = jax.tree.map(lambda new, old: (old - np.asarray(new)) / config.learning_rate, clipped, PARAMS)
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(moved)))
    assert norm == pytest.approx(1.0, rel=1e-4)
    assert CLIP_EPSILON == 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize(("warm", "steps"), [(10, 40), (0, 40), (10, 11), (60, 40)])
def test_schedules(schedule, power, warm, steps):
    config = OptimizerConfig(
        learning_rate=0.5,
        schedule=schedule,
        warmup_steps=warm,
        warmup_start=0.1,
        warmup_power=power,
        final_learning_rate=0.02,
    )
    times = {0, 1, max(warm - 1, 0), warm, warm + 1, (warm + steps) // 2, steps - 1, steps, steps + 5}
    if warm > steps:  # the run ends before the peak, and no update has a number beyond it
        times = {t for t in times if t < steps}
    rate = learning_rate(config, steps)
    ours = [float(rate(t)) for t in times]
    assert ours == pytest.approx([published_rate(config, t, steps) for t in times], rel=1e-5)


def test_a_step_uses_the_rate_of_the_updates_finished_before_it():
    """The first update has rate(0) = warmup_start, as the published schedule numbers them."""
    config = dataclasses.replace(CONFIG, name="radam", weight_decay=0.0)
    gradient = jax.tree.map(lambda p: np.full(p.shape, 0.01), PARAMS)
    (first,) = run(config, [gradient])
    np.testing.assert_allclose(PARAMS["head"] - np.asarray(first["head"]), config.warmup_start * 0.01, rtol=1e-2)


def test_rates_and_decays_by_path():
    config = dataclasses.replace(
        CONFIG,
        weight_decays=(("bias$", 0.0), ("^head", 0.2)),
        learning_rate_scales=(("layer", 0.5), ("layer/kernel", 0.0)),
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(config, STEPS, params)
    decay_alone, _ = optimizer.update(zeros, optimizer.init(params), params)
    rate = config.warmup_start
    np.testing.assert_allclose(decay_alone["head"], -rate * 0.2 * PARAMS["head"], rtol=1e-5)
    np.testing.assert_array_equal(decay_alone["layer"]["bias"], 0)
    np.testing.assert_array_equal(decay_alone["layer"]["kernel"], 0)

    default = dataclasses.replace(CONFIG, weight_decay=0.0)
    ones = jax.tree.map(jnp.ones_like, params)
    update = lambda config: (o := make_optimizer(config, STEPS, params)).update(ones, o.init(params), params)[0]
    full, scaled = update(default), update(dataclasses.replace(default, learning_rate_scales=(("layer/bias", 0.5),)))
    np.testing.assert_allclose(scaled["layer"]["bias"], 0.5 * full["layer"]["bias"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["head"], full["head"])


def test_a_scale_of_zero_freezes():
    config = dataclasses.replace(CONFIG, learning_rate_scales=(("^layer/", 0),))
    last = run(config, gradients_of(3))[-1]
    jax.tree.map(np.testing.assert_array_equal, last["layer"], jax.tree.map(np.float32, PARAMS["layer"]))
    assert not np.allclose(last["head"], PARAMS["head"])


def test_shapes_are_enough_to_make_an_optimizer():
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    values = by_path(shapes, (("bias", 2), ("layer/b", 3)), 1.0, "weight_decays")
    assert values == {"layer": {"kernel": 1.0, "bias": 3.0}, "head": 1.0}


@pytest.mark.parametrize("field", ["weight_decays", "learning_rate_scales"])
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("encoder/ssm", 0.0),), r"'encoder/ssm' matches no parameter; there are head, layer/bias, layer/kernel"),
        ((("layer/(", 0.0),), r"'layer/\(' is not a regular expression: missing \)"),
        ((("layer",),), r"\('layer',\) is not a pair of a regular expression and a number"),
        ((("layer", "0.1"),), r"\('layer', '0.1'\) is not a pair"),
        (((0.0, "layer"),), r"\(0.0, 'layer'\) is not a pair"),
        (("layer", 0.0), r"'layer' is not a pair"),
        ((0.0, "layer"), r"0.0 is not a pair"),
    ],
)
def test_groups_that_cannot_be_meant(field, rules, message):
    config = dataclasses.replace(CONFIG, **{field: rules})
    with pytest.raises(UserError, match=rf"^config\.optimizer\.{field}: {message}") as caught:
        make_optimizer(config, STEPS, PARAMS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", 0.0, "must be positive"),
        ("learning_rate", float("nan"), "must be positive"),
        ("clip_norm", -1.0, "must be positive"),
        ("epsilon", 0.0, "must be positive"),
        ("warmup_power", 0.0, "must be positive"),
        ("b1", 1.0, r"must be in \[0, 1\)"),
        ("b2", -0.1, r"must be in \[0, 1\)"),
        ("warmup_steps", -1, "must not be negative"),
        ("warmup_start", -1e-3, "must not be negative"),
        ("final_learning_rate", -1e-3, "must not be negative"),
        ("weight_decay", -0.1, "must not be negative"),
    ],
)
def test_values_that_cannot_be_meant(field, value, message):
    with pytest.raises(ValueError, match=rf"^{field}={value}: {message}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_without_a_limit_gradients_are_as_they_are():
    params = {"w": jnp.array([1.0, -2.0])}
    gradients = {"w": jnp.array([3e4, 4e4])}
    updates = {}
    for limit in (None, 1e9, 1.0):
        optimizer = make_optimizer(dataclasses.replace(CONFIG, name="sgd", clip_norm=limit), 100, params)
        updates[limit] = optimizer.update(gradients, optimizer.init(params), params)[0]["w"]
    np.testing.assert_array_equal(updates[None], updates[1e9])
    assert np.abs(updates[None] - updates[1.0]).min() > 1


@pytest.mark.parametrize("name", grid(["lion", "adafactor", "lamb"], "lion"))
def test_an_optimizer_of_optax_by_its_name(name):
    """It follows the schedule, and decays beside its own steps, by path."""
    config = dataclasses.replace(
        CONFIG, name=name, weight_decays=(("bias$", 0.0),), learning_rate_scales=(("head", 0.5),), clip_norm=None
    )
    rate, params = learning_rate(config, STEPS), jax.tree.map(jnp.asarray, PARAMS)
    theirs = {"lion": {"b1": 0.9, "b2": 0.98}, "lamb": {"b1": 0.9, "b2": 0.98, "eps": 1e-2}, "adafactor": {"eps": 1e-2}}
    optimizer = getattr(optax, name)(rate, **theirs[name], **({} if name == "adafactor" else {"weight_decay": 0.0}))
    state = optimizer.init(params)
    gradients = gradients_of(4)
    for step, (tree, found) in enumerate(zip(gradients, run(config, gradients), strict=True)):
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, tree), state, params)
        scales, decays = {"layer": {"kernel": 1.0, "bias": 1.0}, "head": 0.5}, {"kernel": 0.1, "bias": 0.0}
        moved = lambda p, u, scale, decay, step=step: p + scale * (u - rate(step) * decay * p)
        params = jax.tree.map(moved, params, updates, scales, {"layer": decays, "head": 0.1})
        assert_close([found], [params])


@pytest.mark.parametrize("name", ["lbfgs", "sm3"])
def test_an_optimizer_that_wants_more_than_a_schedule(name):
    with pytest.raises(ValueError, match=rf"^name='{name}': optax.{name} does not run on gradients"):
        dataclasses.replace(CONFIG, name=name)


@pytest.mark.parametrize("name", ["lien", "chain", "sgd2", "_deprecated_dpsgd", "contrib.muon", ""])
def test_a_name_that_is_no_optimizer(name):
    with pytest.raises(
        ValueError, match=rf"^name='{name}': must be one of adamw, radam, sgd, or an optimizer of optax"
    ):
        dataclasses.replace(CONFIG, name=name)


def test_momentum_keeps_one_moment():
    optimizer = make_optimizer(dataclasses.replace(CONFIG, name="sgd"), STEPS, PARAMS)
    state = optimizer.init(jax.tree.map(jnp.asarray, PARAMS))
    assert state._fields == ("count", "first")
