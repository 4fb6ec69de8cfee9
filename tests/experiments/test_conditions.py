"""Hyper-inputs for batches of any task, and runs whose parameters a hypernetwork generates."""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from configs.hyper import noise, rotation
from experiments.common.config import to_dataclass
from experiments.common.errors import UserError
from experiments.evaluation.evaluator import evaluate_run, result_file
from experiments.tasks.conditioned import Conditioned, HyperOptions
from experiments.tasks.conditioned import rotation as matrix
from experiments.training import restore
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.optimizers import OptimizerConfig, make_optimizer
from experiments.training.step import means
from seqboat import hyper

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def small(arm: str = "mip", **changes):
    config = rotation.get_config(arm)
    config.model.hidden = (8,)
    config.hypernetwork.network.hidden = (4, 8)
    config.hypernetwork.evaluations = 3
    config.train.update(steps=6, batch_size=8, log_every=2, evaluate_every=4, checkpoint_every=2)
    config.update_from_flattened_dict(changes)
    return config.to_dict()


def options(condition: str, **fields) -> HyperOptions:
    return HyperOptions(condition=condition, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("degrees", [0, 90, 180])
def test_right_angles_turn_pictures_exactly(degrees):
    picture = np.random.default_rng(0).uniform(size=(8, 8))
    turned = (matrix(degrees, 8) @ picture.reshape(-1)).reshape(8, 8)
    np.testing.assert_allclose(turned, np.rot90(picture, -degrees // 90), atol=1e-8)


def test_other_angles_keep_what_stays_inside():
    weights = matrix(30, 8).sum(1).reshape(8, 8)
    np.testing.assert_allclose(weights[2:6, 2:6], 1, atol=1e-12)
    assert weights.max() < 1 + 1e-12
    assert weights[0, 0] < 0.5  # from outside of the picture


def test_hyper_inputs_are_a_function_of_seed_and_step_alone():
    one, other, later = (build({**small(), "seed": seed}).task for seed in (3, 4, 3))
    started = list(itertools.islice(one.train_batches(2), 3))
    for step, batch in enumerate(started, 2):
        again = later.train_batch(step)
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
        assert batch["condition"].shape == (8, 1)
        assert len(np.unique(batch["condition"])) == 1
        assert batch["condition"][0] != other.train_batch(step)["condition"][0]
    assert len({float(batch["condition"][0, 0]) for batch in started}) == 3


def test_an_evaluation_goes_through_its_hyper_inputs():
    task = build(small()).task
    batches = list(task.evaluation_batches("test"))
    found = [float(batch["condition"][0, 0]) for batch in batches]
    assert found == [0.0] * 25 + [0.5] * 25 + [1.0] * 25
    np.testing.assert_allclose(
        batches[50]["inputs"][0].reshape(8, 8), np.rot90(batches[0]["inputs"][0].reshape(8, 8), -1), atol=1e-6
    )
    assert [z.shape for z in build(noise.get_config().to_dict()).task.evaluated()] == [(8,)] * 17
    only = build(small(**{"hypernetwork.at": (0.25,)})).task
    assert {float(batch["condition"][0, 0]) for batch in only.evaluation_batches("test")} == {0.25}


@pytest.mark.breadth  # test_hyper_inputs_are_a_function_of_seed_and_step_alone; test_build.py: the penalty
def test_the_penalty_is_multiplied_by_the_hyper_input(light, initial):
    experiment = light({"train.activation_penalty": 2.0})
    state = initial(experiment)
    batch = experiment.task.train_batch(0)
    step = jax.jit(experiment.functions.train)
    gate = lambda batch: step(state, batch, experiment.seed).opt_state.first["gate"]
    first = lambda penalty: gate({**batch, "penalty": np.full(8, penalty, np.float32)})
    np.testing.assert_array_equal(gate(batch), first(1.0))
    np.testing.assert_allclose(first(0.5), (first(0.0) + first(1.0)) / 2, rtol=1e-3, atol=1e-6)
    assert np.abs(first(1.0) - first(0.0)).max() > 1e-4


# test_resume.py: resuming; tests/hyper: what is trained; test_an_evaluation_goes_through_its_hyper_inputs
@pytest.mark.breadth
def test_a_run_resumes_bit_for_bit_and_is_evaluated(remembering, tmp_path):
    experiment = remembering(build(small()))
    train(experiment, tmp_path)
    whole = restore.load(tmp_path, 6)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    train(experiment, tmp_path)
    again = restore.load(tmp_path, 6)
    jax.tree.map(np.testing.assert_array_equal, whole.variables, again.variables)
    result = evaluate_run(tmp_path)
    assert result["examples"] == 200  # however many hyper-inputs
    alone = evaluate_run(tmp_path, at=(0.5,))
    assert alone["at"] == (0.5,)
    assert 0.5 < result["standard_errors"]["loss"] / alone["standard_errors"]["loss"] < 1.5
    assert result_file(alone) == f"evaluation_test_{alone['step']}_at_0.5.json"
    assert (tmp_path / result_file(alone)).is_file()
    assert result["config"]["hypernetwork"]["condition"] == "rotation"
    assert 0 <= result["accuracy"] <= 1


@pytest.mark.slow
def test_a_seqboat_whose_layers_are_generated_from_the_penalty_trains(tiny, tmp_path):
    values = tiny({"train.activation_penalty": 0.1, "train.steps": 2})
    group = base.hyper("penalty")
    group.select = ("encoder/layers/**",)
    group.network.hidden = (4,)
    group.network.heads = (("**/gau/*/kernel", "scale"),)
    values["hypernetwork"] = group.to_dict()
    experiment = build(values)
    assert "arrays from penalty, 2 layers" in experiment.describe()
    train(experiment, tmp_path)
    run = restore.load(tmp_path)
    assert isinstance(run.experiment.model, hyper.Hyper)
    evaluate = jax.jit(run.experiment.functions.evaluate)
    task = run.experiment.task
    batch = next(task.task.evaluation_batches("test"))
    rates = [means(evaluate(run.variables, task.at(batch, np.float32([z]))))["loss"] for z in (0.0, 1.0)]
    assert rates[0] != rates[1]
    assert all(math.isfinite(rate) for rate in rates)


@pytest.mark.breadth  # test_loop.py: any run starts from another
def test_a_hypernetwork_starts_from_a_run_of_its_target(untrained, tmp_path):
    plain = small(**{"train.steps": 2})
    plain["hypernetwork"] = None
    untrained(plain, tmp_path / "plain", 2)
    experiment = build(small("zero_head"))
    start = restore.initial_variables(experiment, tmp_path / "plain")
    wanted = restore.load(tmp_path / "plain")
    batch = experiment.task.task.train_batch(5)
    arguments = (jnp.asarray(batch["inputs"]), jnp.asarray(batch["lengths"]))
    np.testing.assert_array_equal(
        jax.jit(experiment.model.apply)(start, jnp.array([0.7]), *arguments).logits,
        jax.jit(wanted.experiment.model.apply)(wanted.variables, *arguments).logits,
    )
    other = build(small("zero_head", **{"model.hidden": (16,)}))
    with pytest.raises(UserError, match=r"head/kernel is float32\[8, 10\], not float32\[16, 10\]"):
        restore.initial_variables(other, tmp_path / "plain")


@pytest.mark.breadth  # test_optimizers.py: test_an_optimizer_of_optax_by_its_name
def test_sgd_is_optax_sgd_with_momentum():
    config = OptimizerConfig(name="sgd", learning_rate=0.1, warmup_steps=0, b1=0.9, weight_decay=0.0, clip_norm=1e9)
    params = {"w": jnp.array([1.0, -2.0])}
    ours = make_optimizer(dataclasses.replace(config, final_learning_rate=0.1), 10, params)
    theirs = optax.sgd(0.1, momentum=0.9)
    states = [ours.init(params), theirs.init(params)]
    for step in range(3):
        gradient = {"w": jnp.array([0.3, 0.1]) * (step + 1)}
        (got, states[0]), (wanted, states[1]) = (
            each.update(gradient, state, params) for each, state in zip((ours, theirs), states, strict=True)
        )
        np.testing.assert_allclose(got["w"], wanted["w"], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hypernetwork.select": ("hidden_9/*",)},
            r"config\.hypernetwork: select='hidden_9/\*' matches no parameter; there are head",
        ),
        ({"hypernetwork.network.heads": (("x", "full"),)}, r"config\.hypernetwork: heads='x' matches no parameter"),
        ({"hypernetwork.network.head": "fool"}, r"config\.hypernetwork\.network\.head='fool': must be one of full"),
        (
            {"hypernetwork.condition": "angle"},
            r"config\.hypernetwork\.condition='angle': must be one of penalty, rotation, noise",
        ),
        ({"hypernetwork.network.encoding.inputs": 2}, "condition='rotation' is one number"),
        ({"hypernetwork.network.encoding.high": 2.0}, r"is in 0\.\.1"),
        ({"hypernetwork.at": (1.5,)}, r"at=\(1\.5,\): must be 1 numbers in 0\.0\.\.1\.0"),
        ({"hypernetwork.evaluations": 0}, "evaluations=0: must be at least 1"),
        ({"hypernetwork.network.residual": False, "hypernetwork.network.head": "scale"}, "needs residual=True"),
        (
            {"hypernetwork.condition": "penalty"},
            r"wants a model with attention, and in config\.train\.activation_penalty",
        ),
        ({"mesh": "data"}, r"config\.mesh='data': with config\.hypernetwork a run takes one device"),
    ],
)
def test_bad_values_name_the_field(changes, message):
    with pytest.raises(UserError, match=message):
        build(
            small(**{name: value for name, value in changes.items() if name != "mesh"}) | {"mesh": changes.get("mesh")}
        )


def test_rotation_wants_pictures(tiny):
    values = tiny()
    values["hypernetwork"] = base.hyper("rotation").to_dict()
    with pytest.raises(UserError, match="needs pictures of 8 x 8"):
        build(values)


NETWORK_KNOBS = {
    "hidden": (6,),
    "negative_slope": 0.2,
    "head": "chunked",
    "heads": (("head/*", "scale"),),
    "residual": False,
    "init": "zero",
    "dtype": "bfloat16",
}
MORE_KNOBS = {
    "rank": (2, {"head": "low_rank"}),
    "chunk_size": (7, {"head": "chunked"}),
    "chunk_embedding": (3, {"head": "chunked"}),
    "target_gain": (1.0, {"init": "hyperfan_in"}),
}
ENCODING_KNOBS = {"kind": "none", "inputs": 2, "low": -1.0, "high": 2.0, "unit_norm": True}


def texts(changes) -> Iterator[str]:
    """What a model computes to initialise itself, and in evaluation, which is traced if it is asked for."""
    values = small(**{"hypernetwork.condition": "noise", **changes})
    experiment = build(values)
    init, state = jax.make_jaxpr(lambda: experiment.functions.init(0), return_shape=True)()
    yield str(init)
    yield str(jax.make_jaxpr(experiment.functions.evaluate)({"params": state.params}, experiment.task.train_batch(0)))


def differ(some: Iterable[str], others: Iterable[str]) -> bool:
    return any(one != other for one, other in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def original() -> tuple[str, ...]:
    return tuple(texts({"hypernetwork.network.encoding.inputs": 3}))


@pytest.mark.breadth  # tests/hyper: each of them
def test_every_knob_of_a_hypernetwork_does_something(original):
    group = base.hyper("noise")
    known = {*NETWORK_KNOBS, *MORE_KNOBS, "encoding"}
    assert set(group.network) == known
    assert set(group.network.encoding) == {*ENCODING_KNOBS, "size"}
    three = {"hypernetwork.network.encoding.inputs": 3}
    for name, value in NETWORK_KNOBS.items():
        assert differ(texts({**three, f"hypernetwork.network.{name}": value}), original), name
    for name, value in ENCODING_KNOBS.items():
        assert differ(texts({**three, f"hypernetwork.network.encoding.{name}": value}), original), name
    for name, (value, setting) in MORE_KNOBS.items():
        with_it = {**three, **{f"hypernetwork.network.{key}": other for key, other in setting.items()}}
        assert differ(texts({**with_it, f"hypernetwork.network.{name}": value}), texts(with_it)), name


def test_options_are_read_from_a_config():
    group = base.hyper("penalty").to_dict()
    found = to_dataclass(HyperOptions, group, "config.hypernetwork")
    assert found == options("penalty", network=hyper.HyperConfig())
    assert isinstance(build(small()).task, Conditioned)
