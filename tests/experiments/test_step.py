"""The training step: exact gradients of exact means, and a state that one bad step cannot spoil."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training.experiment import build
from experiments.training.loop import evaluate
from experiments.training.step import StepFunctions, TrainState, means
from seqboat.ops.losses import cross_entropy
from tests.helpers import grid


@functools.cache
def compiled(train):
    """The program that the loop compiles."""
    return jax.jit(train, donate_argnums=0)


def step_of(experiment, batch, state) -> TrainState:
    """The state after a step."""
    return compiled(experiment.functions.train)(jax.tree.map(np.array, state), batch, experiment.seed)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Relative to the largest entry of a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(float(jnp.abs(e).max()), 1e-30))


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def weighted(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose rows weigh unequally, and whose parts differ in weight and in length."""
    weights = np.linspace(0.25, 2, len(batch["weights"]), dtype=np.float32)
    return jax.tree.map(jnp.asarray, {**batch, "weights": weights})


@pytest.fixture(scope="module")
def seqboat(tiny, random_state):
    """A whole SeqBoat, its batch, state, and gradient by `jax.grad` of the plain mean loss."""
    experiment = build(tiny())
    batch = weighted(experiment.task.train_batch(0))
    state = jax.tree.map(jnp.asarray, random_state(experiment))

    def mean_loss(params):
        out, _ = experiment.model.apply(
            {"params": params}, batch["inputs"], batch["lengths"], True, mutable=["batch_stats"]
        )
        losses = cross_entropy(out.logits, batch["targets"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    return batch, state, jax.jit(jax.grad(mean_loss))(state.params)


@pytest.mark.breadth  # test_carry.py: test_the_first_gradient_is_the_parallel_one, of a SeqBoat in two parts
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_of_seqboat_is_that_of_the_gradient_of_the_mean_loss(tiny, seqboat, accumulate):
    """Adam would hide a wrong scale and enlarge rounding, so the gradient is read from its first moment."""
    batch, state, gradient = seqboat
    experiment = build(tiny({"train.accumulate": accumulate}))
    after = step_of(experiment, batch, state)
    scale = float(optax.tree.norm(gradient))
    factor = min(1.0, experiment.config.optimizer.clip_norm / scale) * (1 - experiment.config.optimizer.b1)
    difference = jax.tree.map(lambda m, g: m / factor - g, after.opt_state.first, gradient)
    assert float(optax.tree.norm(difference)) < 3e-6 * scale
    assert float(after.metrics["gradient_norm"][0]) == pytest.approx(scale, rel=1e-5)
    assert int(after.step) == 1
    assert int(after.bad_step) == -1
    assert not np.array_equal(after.params["head"]["kernel"], state.params["head"]["kernel"])


@pytest.mark.parametrize("penalty", grid((0.0, 0.3), 0.3))
def test_accumulating_changes_nothing(light, initial, penalty):
    batch = weighted(light().task.train_batch(0))
    experiment = light({"train.activation_penalty": penalty})
    state = initial(experiment)
    whole = step_of(experiment, batch, state)
    parts = step_of(light({"train.activation_penalty": penalty, "train.accumulate": 4}), batch, state)
    assert_close(parts.opt_state, whole.opt_state)
    assert_close(parts.params, whole.params)
    parts, whole = means(parts.metrics), means(whole.metrics)
    assert set(parts) == set(whole)
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.breadth  # test_accumulating_changes_nothing, in the metrics too
def test_the_elements_of_accumulated_parts_are_all_counted(light, initial):
    experiment = light({"train.accumulate": 4})
    batch = experiment.task.train_batch(0)
    parts = step_of(experiment, batch, initial(experiment))
    assert float(parts.metrics["elements"][0]) == batch["lengths"].sum()


@pytest.mark.breadth  # test_build.py: every knob
def test_the_activation_penalty_moves_the_probability_alone(light, initial):
    """Its gradient is penalty * d(mean probability); the parameter that only the router reads gets nothing else."""
    free, dear, dearer = (
        light({"train.activation_penalty": penalty, "optimizer.clip_norm": 1e9}) for penalty in (0, 1, 2)
    )
    batch = weighted(free.task.train_batch(0))
    state = initial(free)
    first = [step_of(experiment, batch, state).opt_state.first for experiment in (free, dear, dearer)]

    def probability(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, _ = free.model.apply(variables, batch["inputs"], batch["lengths"], True, mutable=["batch_stats"])
        return (out.layers.probability.sum() / out.layers.elements.sum()).sum()

    expected = jax.tree.map(lambda g: 0.1 * g, jax.jit(jax.grad(probability))(state.params))
    np.testing.assert_array_equal(first[0]["gate"], 0)
    assert_close(jax.tree.map(jnp.subtract, first[1], first[0]), expected, 1e-4)
    assert_close(jax.tree.map(jnp.subtract, first[2], first[0]), jax.tree.map(lambda g: 2 * g, expected), 1e-4)


@pytest.mark.slow
def test_the_activation_penalty_reaches_the_router_of_seqboat_and_not_its_module(tiny, seqboat):
    batch, state, gradient = seqboat
    experiment = build(tiny({"train.activation_penalty": 0.5, "optimizer.clip_norm": 1e9}))
    first = step_of(experiment, batch, state).opt_state.first
    penalised = jax.tree.map(lambda m: m / (1 - experiment.config.optimizer.b1), first)
    layers, free = (g["encoder"]["layers"] for g in (penalised, gradient))
    router, free_router = layers["sparse"]["configurator"], free["sparse"]["configurator"]
    change = float(optax.tree.norm(jax.tree.map(jnp.subtract, router, free_router)))
    assert change > 1e-2 * float(optax.tree.norm(free_router))
    # The last layer's module and head come after every decision: their gradients do not depend on the penalty.
    last = lambda tree: jax.tree.map(lambda leaf: leaf[-1], tree)
    assert_close(last(layers["gau"]), last(free["gau"]), 1e-4)
    assert_close(penalised["head"], gradient["head"], 1e-4)


def with_loss(task, spoil):
    """The loss of a task, spoilt for a batch whose first target is negative."""

    def loss(out, batch):
        total, weight, metrics = task.loss(out, {**batch, "targets": jnp.maximum(batch["targets"], 0)})
        total = spoil(total, batch["targets"].min() < 0)
        return total, weight, {**metrics, "loss": (total, weight)}

    return loss


SPOILS = {
    "nan": lambda total, bad: total * jnp.where(bad, jnp.nan, 1.0),
    "constant inf": lambda total, bad: total + jnp.where(bad, jnp.inf, 0.0),
    "overflow": lambda total, bad: total * jnp.where(bad, 1e30, 1.0) * jnp.where(bad, 1e30, 1.0),
}


@pytest.mark.parametrize(
    ("spoil", "accumulate"),
    grid(
        {f"{name}, {parts}": (spoil, parts) for name, spoil in SPOILS.items() for parts in (1, 4)},
        "nan, 4",
    ),
)
def test_a_bad_step_leaves_the_state_as_it_was(light, initial, accumulate, spoil):
    settings = {"train.accumulate": accumulate}
    experiment = light(settings, loss=with_loss(light().task, spoil))
    good = experiment.task.train_batch(0)
    bad = {**good, "targets": np.where(np.arange(8) == 5, -1, good["targets"])}  # in the third of four parts
    before = step_of(experiment, good, initial(experiment))
    assert int(before.bad_step) == -1
    after = step_of(experiment, bad, before)
    later = step_of(experiment, good, after)
    for state, step in ((after, 2), (later, 3)):
        assert int(state.bad_step) == 1  # the batch of that number; it is not overwritten
        assert int(state.step) == step
        assert_equal(dataclasses.replace(state, step=before.step, bad_step=before.bad_step), before)


@pytest.mark.breadth  # test_an_update_that_is_not_finite_changes_nothing
def test_a_gradient_that_is_not_finite_is_a_bad_step_too(light, initial):
    """sqrt at zero: the loss is finite, its gradient is not."""

    def loss(out, batch):
        total = jnp.sqrt(jnp.square(out.logits - jax.lax.stop_gradient(out.logits)).sum())
        return total, jnp.ones(()), {"loss": (total, jnp.ones(()))}

    experiment = light(loss=loss)
    before = initial(experiment)
    after = step_of(experiment, experiment.task.train_batch(0), before)
    assert int(after.bad_step) == 0
    assert_equal(after.params, before.params)


def test_metrics_of_several_steps_are_means_over_all_weights(light, initial):
    experiment = light({"optimizer.learning_rate_scales": ((".", 0.0),)})  # nothing moves
    task, state = experiment.task, initial(experiment)
    forward = jax.jit(experiment.model.apply)
    losses, correct, weights, active, elements = [], [], [], 0.0, 0.0
    for number in range(3):
        batch = jax.tree.map(jnp.asarray, task.train_batch(number))
        batch["weights"] = np.random.default_rng(number).random(8).astype(np.float32) * 10**number
        out = forward({"params": state.params, "batch_stats": state.batch_stats}, batch["inputs"], batch["lengths"])
        state = step_of(experiment, batch, state)
        losses.append(np.asarray(cross_entropy(out.logits, batch["targets"])))
        correct.append(np.asarray(out.logits.argmax(-1)) == batch["targets"])
        weights.append(batch["weights"])
        active, elements = active + np.asarray(out.layers.active), elements + batch["lengths"].sum()
    total, values = np.sum(weights), means(state.metrics)
    assert values["loss"] == pytest.approx(float((np.array(losses) * weights).sum() / total), rel=1e-5)
    assert values["accuracy"] == pytest.approx(float((np.array(correct) * weights).sum() / total), rel=1e-5)
    assert values["activation_rate"] == pytest.approx((active[:, 0] / elements).tolist(), rel=1e-6)
    assert values["elements"] == pytest.approx(float(elements) / 3)
    assert values["gradient_norm"] > 0


def test_a_mean_of_nothing_is_nan():
    sums = {"a": (jnp.zeros(()), jnp.zeros(())), "b": (jnp.array([0.0, 3.0]), jnp.array([0.0, 2.0]))}
    values = means(sums)
    assert np.isnan(values["a"])
    assert np.isnan(values["b"][0])
    assert values["b"][1] == 1.5


@pytest.mark.parametrize("batch_size", grid((7, 40, 64), 7))
def test_a_padded_last_batch_is_evaluated_exactly(light, initial, batch_size):
    """40 examples in batches of 7 leave a last one of 5, in a batch of 64 they leave 24 rows of nothing."""
    experiment = light({"train.batch_size": batch_size})
    state = initial(experiment)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    values = evaluate(
        jax.jit(experiment.functions.evaluate), variables, experiment.task.evaluation_batches("validation")
    )

    task = experiment.task
    examples = [(task.encode(item), task.label(item)) for item in task._sources["validation"]]
    assert len(examples) == 40
    losses, correct, active = [], [], 0
    for ids, label in examples:
        rows = np.asarray(state.params["table"], np.float64)[ids]
        logits = rows.mean(0)
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
        correct.append(logits.argmax() == label)
        active += (rows.sum(1) > 0).sum()
    assert values["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert values["accuracy"] == pytest.approx(np.mean(correct), rel=1e-6)
    assert values["activation_rate"] == pytest.approx([active / sum(len(ids) for ids, _ in examples)] * 2, rel=1e-6)


def test_dropout_is_a_function_of_seed_and_step(light, initial):
    same, other = light({"model.dropout": 0.5}), light({"model.dropout": 0.5, "seed": 1})
    batch = same.task.train_batch(0)
    state = initial(same)
    now = step_of(same, batch, state)
    assert_equal(step_of(same, batch, state), now)
    gradient = lambda after: np.asarray(after.opt_state.first["table"])
    later = step_of(same, batch, dataclasses.replace(state, step=state.step + 1))
    assert not np.array_equal(gradient(later), gradient(now))
    assert not np.array_equal(gradient(step_of(other, batch, state)), gradient(now))


@pytest.mark.breadth  # test_accumulating_changes_nothing, test_dropout_is_a_function_of_seed_and_step
def test_parts_of_a_batch_have_their_own_dropout_and_pass_statistics_on(light, initial):
    experiment = light({"train.accumulate": 2, "model.dropout": 0.5})
    batch = jax.tree.map(jnp.asarray, experiment.task.train_batch(0))
    twice = jax.tree.map(lambda a: jnp.concatenate([a[:4], a[:4]]), batch)
    state = initial(experiment)
    after = step_of(experiment, twice, state)
    key = jax.random.fold_in(jax.random.key(0), 0)
    half = jax.tree.map(lambda a: a[:4], batch)
    stats, gradients = state.batch_stats, []
    objective_gradient = jax.jit(jax.grad(experiment.functions.objective, has_aux=True))
    for part in range(2):
        gradient, (_, _, changed) = objective_gradient(state.params, stats, half, jax.random.fold_in(key, part))
        gradients.append(gradient["table"])
        stats = changed["batch_stats"]
    assert not np.array_equal(gradients[0], gradients[1])
    assert_close(after.batch_stats, stats)


@pytest.mark.parametrize("value", grid((float("nan"), float("inf"), 3e38), 3e38))
def test_an_update_that_is_not_finite_changes_nothing(light, value):
    """Of a finite loss and a finite gradient."""
    experiment = light()
    batch = experiment.task.train_batch(0)
    functions = StepFunctions(
        experiment.model,
        experiment.task.loss,
        lambda params: optax.chain(optax.clip_by_global_norm(1e-30), optax.add_decayed_weights(value), optax.sgd(-10)),
        batch,
    )
    before = jax.jit(lambda: functions.init(0))()
    after = jax.jit(functions.train)(before, batch, 0)
    assert int(after.bad_step) == 0
    assert_equal(after.params, before.params)
    assert_equal(after.opt_state, before.opt_state)


def test_runs_of_other_seeds_share_their_programs(light):
    """Or every seed of a sweep would be compiled anew."""

    def texts(seed):
        experiment = light({"seed": seed, "model.dropout": 0.5})
        state = jax.eval_shape(experiment.functions.init, experiment.seed)
        batch = experiment.task.train_batch(0)
        init = jax.jit(experiment.functions.init).lower(experiment.seed).as_text()
        return init, jax.jit(experiment.functions.train).lower(state, batch, experiment.seed).as_text()

    assert texts(0) == texts(2**32 - 1)


def test_the_largest_seed_draws_what_its_integer_draws():
    draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed)))
    assert draw(np.uint32(2**32 - 1)) == jax.random.normal(jax.random.key(2**32 - 1))
