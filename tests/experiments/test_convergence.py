"""Whether two runs agree: planted units and masks, the bars of the study, its table, and a tiny run of it."""

import json

import jax
import numpy as np
import pytest

from experiments.evaluation import agreement
from experiments.pages import studies as pages
from experiments.studies import convergence
from experiments.studies.dictionaries import Plan
from tests.helpers import SMALL_MODEL

RNG = np.random.default_rng(0)
LENGTHS = np.array([8, 8, 6, 7] * 40)
VALID = np.arange(8) < LENGTHS[:, None]
UNITS = RNG.standard_normal((len(LENGTHS), 8, 5)).astype(np.float32)


def test_permuted_units_are_matched_where_sequences_have_elements():
    order, signs = np.array([3, 1, 4, 0, 2]), np.array([1, -1, 1, -1, 1], np.float32)
    other = np.where(VALID[..., None], UNITS[..., order] * signs, RNG.standard_normal(UNITS.shape)).astype(np.float32)
    found = agreement.matched(UNITS, other, VALID, jax.random.key(0), signed=False)
    np.testing.assert_array_equal(order[found.pairs.columns], found.pairs.rows)
    values = found.values()
    assert values["units"] == [5, 5]
    assert values["mean"] == pytest.approx(1, abs=1e-6)
    assert values["rolled"] < 0.2
    assert [found.c[tuple(pair)] > 0 for pair in values["pairs"]] == (signs[found.pairs.columns] > 0).tolist()
    signed = agreement.matched(UNITS, other, VALID, jax.random.key(0), signed=True)
    assert signed.values()["mean"] < 0.7, "of opposite units the signed value is the worst"


def test_routes_that_agree_and_that_only_share_a_rate():
    active = RNG.random(VALID.shape) < 0.7
    same = agreement.routing(active, active, VALID, jax.random.key(0))
    assert (same["kappa"], same["same"]) == (1, 1)
    assert same["rates"] == [active[VALID].mean()] * 2
    assert same["rolled"]["least"] <= same["rolled"]["mean"] <= same["rolled"]["most"] < 0.3
    other = agreement.routing(active, RNG.random(VALID.shape) < 0.7, VALID, jax.random.key(0))
    assert abs(other["kappa"]) < 0.15
    assert other["same"] == pytest.approx(0.58, abs=0.1)


def row(seeds, layer, features, rolled, channels):
    routing = {"kappa": -0.071, "rates": [0.8, 0.7], "same": 0.6, "rolled": {"mean": 0, "least": -0.01, "most": 0.01}}
    predicted = {"r2": 0.5, "from": 6.25}
    arm = {
        "features": {"units": [4, 4], "mean": features, "rolled": rolled, "most_similar": 0.8, "predicted": predicted},
        "channels": {"units": [2, 2], "mean": channels, "rolled": 0.04},
        "routing": routing,
    }
    return {"seeds": seeds, "layer": layer, "trained": arm, "untrained": arm}


def test_the_worst_pair_meets_a_bar_or_does_not_and_is_in_the_table():
    rows = [row([10, 11], 1, 0.7, 0.02, 0.6), row([10, 11], 2, 0.4, 0.1, 0.2)]
    rows += [row([10, 12], 1, 0.6, 0.02, 0.58), row([10, 12], 2, 0.25, 0.1, 0.2)]
    checked = convergence.bars(rows)
    found = [(round(bar["value"], 2), bar["met"]) for bar in checked]
    assert found == [(0.58, True), (0.02, False), (0.15, False), (0.05, True)]
    table = convergence.section({"pairs": rows})
    assert "| **features**, one to one: mean correlation | 0.700 0.600 | 0.400 0.250 |" in table
    assert "| **routing**: kappa | -0.071 -0.071 | -0.071 -0.071 |" in table
    assert "Pairs of seeds: 10 and 11, 10 and 12;" in table
    line = "| layer 1: correlation of features over channels | 0.020 | at least 0.03 | **not met** |"
    assert line in pages.bars({"bars": checked})


@pytest.mark.slow
def test_a_tiny_study_of_convergence(tmp_path):
    sizes = {"task.test_examples": 128, "task.states": 12, "task.edges": 2, "task.length": 16, "train.steps": 2}
    few = {"train.steps": 2, "train.batch_size": 64, "task.chunk": 1, "task.evaluation_batches": 1}
    few |= {"model.k": 2, "optimizer.warmup_steps": 1}
    plan = Plan(
        seeds=(3, 4),
        model={**SMALL_MODEL, **sizes, "optimizer.warmup_steps": 1},
        dictionary={**few, "model.auxiliary_k": 2},
        sites={"m": 24},
        layers=(2,),
    )
    saved = []
    checked = convergence.run(plan, tmp_path, lambda result: saved.append(json.dumps(result)))
    result = json.loads(saved[-1])
    assert result["bars"] == json.loads(json.dumps(checked))
    (pair,) = result["pairs"]
    assert (pair["seeds"], pair["layer"]) == ([3, 4], 2)
    for arm in ("trained", "untrained"):
        assert pair[arm]["features"]["units"] == [24, 24]
        assert pair[arm]["features"]["mean"] <= pair[arm]["features"]["most_similar"] <= 1
        assert -1 <= pair[arm]["routing"]["kappa"] <= 1
    own = {"model", "model_m_2", "untrained", "untrained_m_2"}
    assert {path.name for path in (tmp_path / "seed_4").iterdir()} == own
