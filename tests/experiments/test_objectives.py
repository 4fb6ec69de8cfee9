"""Objectives: what they add, that a run without them is what it was, and guides that are kept in checkpoints."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_resume import assert_same_run

from configs import base
from configs.synthetic import mqar
from experiments.common.errors import UserError
from experiments.objectives.guidance import Config, Objective, draw_rows, pairs, shift
from experiments.training import objectives
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.restore import load
from tests.helpers import assert_close, rms

# Without attention a step compiles in a second.
QUICK = {"model.activation": "never", "model.remat": "none", "train.evaluate_every": 6}


@pytest.fixture(scope="module")
def kept(tiny, untrained, tmp_path_factory) -> Path:
    return untrained(tiny({**QUICK, "model.layers": 3, "model.features": 4}), tmp_path_factory.mktemp("kept") / "guide")


@pytest.fixture
def guide(kept, tmp_path) -> Path:
    """A copy: some tests remove it."""
    return Path(shutil.copytree(kept, tmp_path / "guide"))


@pytest.fixture
def guided(tiny, guide):
    """guided(weight=2.0) is the values of an experiment with that guide."""

    def values(changes=None, **fields):
        plain = tiny({**QUICK, **(changes or {})})
        return {
            **plain,
            "objectives": base.objective("guidance", **{"run": str(guide), "rows": 16, **fields}).to_dict(),
        }

    return values


def attach(values, checkpoints="nowhere"):
    return objectives.attach(build(values), Path(checkpoints))


@pytest.mark.breadth  # test_an_objective_moves_the_gradient_by_its_coefficient; test_resume.py: resuming
def test_a_guided_run_resumes_bit_for_bit_without_its_guide(guided, guide, tmp_path):
    values = guided(until=1.0)
    train(build(values), tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/6")
    shutil.rmtree(guide)
    train(build(values), tmp_path / "killed")
    experiment = attach(values, tmp_path / "unbroken/checkpoints")
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken", experiment)
    assert set(load(tmp_path / "killed").variables) == {"params", "batch_stats"}
    with pytest.raises(UserError, match=r"guidance.run='other': this run has had another guide, run='.*guide'"):
        attach(guided(run="other"), tmp_path / "unbroken/checkpoints")


class Weights:
    """A stub: half the sum of the squares of a table, in two parts."""

    taps = False

    def abstract(self):
        return {"scale": jax.ShapeDtypeStruct((), np.float32)}

    def __call__(self, frozen, params, out, taps, batch, key, step):
        return {"half": (frozen["scale"], (params["table"] ** 2).sum(), 2.0), "nothing": (1.0, 0.0, 0.0)}


def test_an_objective_moves_the_gradient_by_its_coefficient(light):
    functions = light().functions
    own = dataclasses.replace(functions, objectives={"stub": Weights()})
    state, batch, key = jax.jit(lambda: own.init(0))(), light().task.train_batch(0), jax.random.key(0)
    assert state.frozen == {"stub": {"scale": 0}}
    run = jax.jit(
        lambda state, guides: [
            each.gradients(state.params, state.batch_stats, batch, key, given)
            for each, given in ((functions, {}), (own, guides))
        ]
    )
    (plain, *_), (still, *_) = run(state, own._guides({"stub": {"scale": 0.0}}, state.step))
    assert_close(still, plain)
    (plain, *_), (moved, _, metrics, _) = run(state, own._guides({"stub": {"scale": 3.0}}, state.step))
    table, *tables = map(np.asarray, (state.params["table"], moved["table"], plain["table"]))
    assert_close(np.subtract(*tables), 3 * table)
    assert_close(moved["gate"], plain["gate"])
    assert_close(metrics["stub/half"], ((table**2).sum(), np.float32(2)))


@pytest.mark.breadth  # test_an_objective_moves_the_gradient_by_its_coefficient; tests/ops/test_similarity.py
def test_guidance_moves_the_gradient_until_its_last_step(guided, tiny):
    plain, other = build(tiny(QUICK)), attach(guided(until=0.5))
    start = jax.jit(lambda: plain.functions.init(0))()
    batch, key = plain.task.train_batch(0), jax.random.key(0)
    frozen = {"guidance": other.functions.objectives["guidance"].frozen()}

    @jax.jit
    def run(state, step, frozen):
        each = [
            some.functions.gradients(state.params, state.batch_stats, batch, key, some.functions._guides(frozen, step))
            for some in (plain, other)
        ]
        return [gradient["encoder"]["layers"] for gradient, *_ in each], each[1][2]["guidance/cka_distance"]

    (none, one), (distance, steps) = run(start, 2, frozen)
    assert all(rms(a - b) > 1e-3 * rms(b) for a, b in zip(*map(jax.tree.leaves, (one, none)), strict=True))
    assert steps == 1
    assert 1 < distance < 4, "of three pairs"
    (none, one), ended = run(start, 3, frozen)
    assert_close(one, none)
    assert ended == (0, 0)


@pytest.mark.breadth  # test_an_objective_moves_the_gradient_by_its_coefficient
def test_without_objectives_the_step_is_what_it_was(tiny):
    """Its text has no argument more than the fields of the state had."""

    def traced(experiment):
        state = jax.eval_shape(lambda: experiment.functions.init(0))
        return jax.make_jaxpr(experiment.functions.train)(state, experiment.task.train_batch(0), experiment.seed), state

    experiment = build(tiny(QUICK))
    plain, state = traced(experiment)
    empty, _ = traced(build({**tiny(QUICK), "objectives": {}}))
    assert state.frozen == {}
    former = dataclasses.replace(state, frozen=None)
    assert len(plain.jaxpr.invars) == len(jax.tree.leaves((former, experiment.task.train_batch(0), experiment.seed)))
    assert str(plain) == str(empty)


def test_a_guide_like_a_group_has_numbers_of_its_own(guided, tiny):
    experiment = attach(guided(run=None, like=tiny({**QUICK, "model.layers": 1})["model"]))
    (objective,) = experiment.functions.objectives.values()
    beta = objective.frozen()["params"]["encoder"]["layers"]["ssm"]["beta"]
    assert beta.shape == objective.abstract()["params"]["encoder"]["layers"]["ssm"]["beta"].shape == (1, 16, 2)
    assert rms(beta) > 0.5


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"train.accumulate": 2}, {}, "config.train.accumulate=2: must be 1 with config.objectives.guidance"),
        ({}, {"run": "gone"}, r"config.objectives.guidance.run='gone': there is no work directory gone"),
        ({}, {"run": None}, r"config.objectives.guidance.run=None: set it to a work directory, or like"),
        ({}, {"weight": -1.0}, r"config.objectives.guidance.weight=-1.0: must not be negative"),
        ({}, {"until": 1.5}, r"config.objectives.guidance.until=1.5: must be in 0..1"),
        ({}, {"rows": 3}, r"config.objectives.guidance.rows=3: must be at least 4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(guided, changes, fields, message):
    with pytest.raises(UserError, match=message) as refused:
        attach(guided(changes, **fields))
    assert "\n" not in str(refused.value)


def test_a_guide_of_another_vocabulary_and_an_unknown_objective_are_refused(guided, tiny, untrained, tmp_path):
    config = mqar.get_config()
    config.train.steps = 0
    other = untrained(config.to_dict(), tmp_path / "mqar")
    with pytest.raises(UserError, match=r"guidance.run='.*mqar': its vocabulary has \d+ symbols, this task's has"):
        attach(guided(run=str(other)))
    with pytest.raises(UserError, match=r"config.objectives='none': there is no file experiments/objectives/none.py"):
        build({**tiny(QUICK), "objectives": {"none": {}}})


def test_rows_are_different_valid_elements_and_layers_are_spread_evenly():
    chosen, valid = jax.jit(draw_rows, static_argnums=(2, 3))(jax.random.key(0), np.array([5, 0, 3]), 6, 10)
    assert sorted(np.asarray(chosen)[np.asarray(valid)]) == [0, 1, 2, 3, 4, 12, 13, 14]
    shuffled = np.asarray(jax.jit(shift)(chosen, valid))[:8]
    assert sorted(shuffled) == [0, 1, 2, 3, 4, 12, 13, 14]
    assert not (shuffled == np.asarray(chosen)[:8]).any()
    assert [list(zip(*map(np.ndarray.tolist, pairs(*n)), strict=True)) for n in ((4, 2), (2, 3))] == [
        [(0, 0), (1, 0), (2, 1), (3, 1)],
        [(0, 0), (0, 1), (1, 2)],
    ]
    assert Objective.taps
    assert Config(run="x").until == 0.2
