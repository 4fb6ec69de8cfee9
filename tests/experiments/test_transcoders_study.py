"""The study of transcoders: what is planted, which links count as recovered, its bars and tables, a tiny run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.studies import transcoders as study
from experiments.studies.protocol import verdict
from seqboat.interp.dictionaries import Atoms
from seqboat.interp.paths import paths
from tests.helpers import SMALL_MODEL

SOURCE = study.Detecting(3, positions=64)


def test_the_planted_network_detects_four_atoms():
    x, y = SOURCE.rows("train", 0, 1)
    assert x.shape == y.shape == (64, 32)
    assert SOURCE.config.target_width == 32
    seen = study.SHARPNESS * (x.astype(np.float64) @ SOURCE.directions[:4].T - study.THRESHOLD)
    detected = seen / (1 + np.exp(-seen)) / study.SHARPNESS
    np.testing.assert_allclose(y, detected @ SOURCE.written, atol=1e-5)
    features = SOURCE.features("train", 0)[:, :4]
    assert detected[features > 0.5].mean() > 20 * np.abs(detected[features == 0]).mean(), "other atoms overlap a little"
    np.testing.assert_allclose(study.source_of(SOURCE).rows("train", 0, 1), [x, x])


def atoms(encoder, decoder) -> Atoms:
    size, zeros = len(decoder), jnp.zeros(32)
    return Atoms(jnp.asarray(encoder), jnp.zeros(size), jnp.asarray(decoder), zeros, zeros, jnp.zeros(()))


def test_links_of_the_truth_are_recovered_and_of_shuffled_or_missing_atoms_are_not():
    up = atoms(SOURCE.directions.T, SOURCE.directions)
    down = atoms(SOURCE.directions[:4].T, SOURCE.written)
    reading, writing = study.nearest(SOURCE.directions[:4], up), study.nearest(SOURCE.written, down)
    assert reading.tolist() == writing.tolist() == [0, 1, 2, 3]
    links = np.asarray(paths(up, down))
    assert study.recovered(links, reading, writing) == 4
    assert study.recovered(np.roll(links, 5, axis=0), reading, writing) == 0
    lost = study.nearest(SOURCE.directions[:4], atoms(SOURCE.directions[2:].T, SOURCE.directions[2:]))
    assert lost.tolist() == [-1, -1, 0, 1], "an atom that was not found"
    assert study.recovered(links[2:], lost, writing) == 2


def test_bars_are_of_the_worst_seed_and_tables_have_every_part():
    told = {"nmse": 0.01, "l0": 2.0}
    planted = [
        {"seed": seed, "recovered": found, "shuffled": 0.1, "most": 1, "missing": 1e-6, "transcoder": told}
        for seed, found in ((1, 4), (2, 3))
    ]
    losses = {"plain": 0.8, "transcoder": 0.9, "dictionary": 0.85, "ablated": 2.0}
    trained = [
        {"layer": layer, "missing": 1e-5, "cost": cost, "losses": losses, "transcoder": told, "dictionary": told}
        for layer, cost in ((1, 0.04), (1, 0.06), (2, -0.01))
    ]
    checked = study.bars(planted, trained)
    assert [verdict(bar) for bar in checked if not bar["met"]] == [
        "NOT MET: planted: links recovered: 3.000, at least 4",
        "NOT MET: layer 1: cost over a dictionary: 0.060, at most 0.05",
    ]
    assert len(checked) == 7
    assert study.bars([], []) == []
    text = study.section({"planted": planted, "trained": trained})
    assert "| 2 | 3 of 4 | 0.10, 1 | 0.010 | 2.0 |" in text
    assert "| with the transcoder | 0.900 (0.900 to 0.900) | 0.900 (0.900 to 0.900) |" in text
    assert study.section({"planted": [], "trained": trained}).startswith(
        "| trained, mean (least to largest) | layer 1 |"
    )
    assert "trained" not in study.section({"planted": planted, "trained": []})


@pytest.mark.slow
def test_a_tiny_study(tmp_path):
    few = {"train.steps": 2, "train.evaluate_every": 2, "train.checkpoint_every": 2, "optimizer.warmup_steps": 1}
    sizes = {"task.test_examples": 64, "task.length": 8, "task.states": 10, "train.batch_size": 8}
    own = {"model.size": 24, "model.k": 2, "task.chunk": 1, "task.evaluation_batches": 1, "train.batch_size": 64}
    plan = study.Plan(
        (3,), (3,), steps=2, model={**SMALL_MODEL, **few, **sizes, "model.feed_forward_size": 6},
        dictionary={**few, **own, "model.auxiliary_k": 2}, layers=(2,),
    )  # fmt: skip
    saved = []
    checked = study.run(plan, tmp_path, lambda result: saved.append(json.dumps(result)))
    result = json.loads(saved[-1])
    assert result["bars"] == json.loads(json.dumps(checked))
    (row,), (layer,) = result["planted"], result["trained"]
    assert max(row["missing"], layer["missing"]) < 1e-4
    assert layer["cost"] == pytest.approx(layer["losses"]["transcoder"] - layer["losses"]["dictionary"])
    assert len(set(layer["losses"].values())) > 1
    with pytest.raises(UserError, match="--arms=wrong: there are planted, trained"):
        study.study(saved.append, workdir=tmp_path, arms=["wrong"])
