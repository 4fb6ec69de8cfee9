"""The study of circuits: what is planted, what an ablation sets to its mean, a tiny run with the guide's example."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import circuits as study
from experiments.studies.protocol import verdict
from seqboat.interp import circuits
from seqboat.interp.edits import Without
from tests.helpers import SMALL_MODEL
from tests.test_readme import python_blocks

PAGE = Path(__file__).parents[2] / "docs/circuits.md"


def test_planted_nodes_differ_in_their_means_only_with_a_shift():
    for shifted in (True, False):
        x, positive, truth = study.planted(3, shifted, 1000)
        assert x.shape == (2000, 32, 16)
        assert (positive.sum(), truth.sum()) == (1000, 5)
        found = circuits.mean_difference(x, positive)
        assert found[~truth].max() < 0.12
        assert found[truth].min() > 0.4 if shifted else found[truth].max() < 0.12
        # The second moments differ in either case.
        moment = lambda rows: np.einsum("nkd,nke->kde", rows, rows) / len(rows)
        apart = np.linalg.norm(moment(x[positive]) - moment(x[~positive]), axis=(1, 2))
        assert apart[truth].min() > 2 * apart[~truth].max()


def test_a_group_of_channels_is_set_to_its_mean():
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    centre = x.mean(0)
    changed = Without(True, study.signed_channels(centre), jnp.array([2, 3, 8, 9]))(jnp.asarray(x))
    expected = x.copy()
    expected[:, 2:4] = centre[2:4]
    np.testing.assert_allclose(changed, expected, atol=1e-6)


def test_negative_examples_have_the_same_tokens():
    batch = {"inputs": np.arange(24).reshape(2, 12), "lengths": np.full(2, 12)}
    found = study.shuffled(batch, 0)
    np.testing.assert_array_equal(np.sort(found["inputs"], 1), batch["inputs"])
    assert (found["inputs"] != batch["inputs"]).any(1).all()
    assert found["lengths"] is batch["lengths"]


def test_bars_are_of_the_mean_planted_and_of_the_worst_copying_seed():
    names = ("unique", "information", "unique_debiased", "information_debiased", "mean_difference")
    row = lambda shifted, value, permuted: {
        "shifted": shifted,
        "auc": dict.fromkeys(names, value),
        "permuted": dict.fromkeys(names, permuted),
    }
    found = {"loss": 0.01, "added": [0.1, 0.2], "seconds": {"codes": 3.0, "ablation": 2.0}}
    copied = [{"seed": 1, "auc": {"information_debiased": a, "mean_difference": 0.5}, **found} for a in (0.9, 0.4)]
    rows = [row(True, 0.9, 0.3), row(True, 1.0, 0.4), row(False, 0.8, 0.3)]
    checked = study.bars(rows, copied)
    values = [(round(bar["value"], 3), bar["met"]) for bar in checked]
    assert values == [
        (0.95, True),
        (0.95, False),
        (0.8, False),
        (0.8, False),
        (0.167, False),
        (0.167, False),
        (-0.1, False),
    ]
    assert study.bars([], []) == []
    text = study.section({"planted": rows, "copying": copied})
    assert "| unique | 0.950 | 0.800 | 0.333 |" in text
    assert "| information debiased | 0.90 | 0.40 |" in text
    assert "| most that one node's ablation adds | 0.20 | 0.20 |" in text
    assert verdict(checked[1]) == "NOT MET: planted, with a shift: mean AUC of information: 0.950, at least 0.97"


@pytest.mark.slow
def test_a_tiny_study_and_the_example_of_the_guide(tmp_path, monkeypatch):
    sizes = {"task.test_examples": 64, "task.length": 8, "task.symbols": 2, "train.steps": 2, "train.batch_size": 8}
    tiny = {**SMALL_MODEL, **sizes, "optimizer.warmup_steps": 1}
    plan = study.Plan((3,), (3,), examples=6, size=32, steps=20, model=tiny, groups=4, batches=2, true=2)
    saved = []
    checked = study.run(plan, tmp_path / "runs", lambda result: saved.append(json.dumps(result)))
    result = json.loads(saved[-1])
    assert result["bars"] == json.loads(json.dumps(checked))
    assert [row["shifted"] for row in result["planted"]] == [True, False]
    (copied,) = result["copying"]
    assert len(copied["added"]) == 8
    assert np.isfinite(copied["added"]).all()
    assert np.ptp(copied["added"]) > 0

    (tmp_path / "runs/seed_3").rename(tmp_path / "runs/copy")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    (block,) = python_blocks(PAGE.read_text())
    exec(block, names)
    assert names["score"].shape == (16,)
    assert np.isfinite(names["score"]).all()
