"""Waves of known factors, and the study of what autoencoders make of them."""

import json
from itertools import islice

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.config import to_dataclass
from experiments.common.errors import UserError
from experiments.studies import disentangle
from experiments.studies.protocol import verdict
from experiments.tasks.factors import FACTORS, Config, Task
from experiments.training.models import build_model
from experiments.training.restore import load
from seqboat.interp.infomec import infomec

SMALL = Config(length=8, values=3)


def task(config: Config = SMALL, **batching: int) -> Task:
    return Task(config, **{"batch_size": 32, "seed": 3, **batching})


def test_an_evaluation_is_every_combination_once():
    batches = list(task().evaluation_batches("test"))
    assert [batch["weights"].sum() for batch in batches] == [32, 32, 17]
    real = np.concatenate([batch["lengths"] for batch in batches]) == 1
    truth = [task().truth(batch) for batch in batches]
    found = {name: np.concatenate([each[name] for each in truth])[real] for name in FACTORS}
    assert len(set(zip(*found.values(), strict=True))) == 81
    waves = np.concatenate([batch["inputs"] for batch in batches])[real, 0]
    assert len(np.unique(waves.round(3), axis=0)) == 81, "no two waves are equal"
    for wave, a, f, p, o in zip(waves, *found.values(), strict=True):
        t = np.arange(8)
        expected = (0.5 + a / 2) * np.sin(2 * np.pi * ((1 + f) * t / 8 + p / 3)) + o - 1
        np.testing.assert_allclose(wave, expected, atol=1e-6)


def test_a_batch_is_a_function_of_seed_and_step():
    batches = list(islice(task().train_batches(2), 2))
    for step, batch in enumerate(batches, 2):
        for name, array in task().train_batch(step).items():
            np.testing.assert_array_equal(array, batch[name])
        assert batch["inputs"].shape == batch["targets"].shape == (32, 1, 8)
        assert (batch["weights"] == 1).all()
    other = task(seed=4).train_batch(2)["inputs"]
    assert np.any(other != batches[0]["inputs"])
    parts = [task(process_index=index, process_count=2).train_batch(2)["inputs"] for index in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), batches[0]["inputs"])


def test_the_mean_has_the_baselines_error():
    whole = task(batch_size=81)
    (batch,) = whole.evaluation_batches("test")
    mean = jnp.broadcast_to(batch["targets"].mean(0), batch["targets"].shape)

    class Output:
        logits = mean

    *_, metrics = whole.loss(Output(), batch)
    assert set(metrics) == {"loss", "nmse"}, "no features, none dead"
    assert float(metrics["nmse"][0] / metrics["nmse"][1]) == pytest.approx(whole.baseline("test")["nmse"], rel=1e-5)
    with pytest.raises(UserError, match="no evaluation split 'dev'; this task has: validation, test"):
        whole.baseline("dev")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": 1}, "values=1: must be at least 2"),
        ({"values": 13}, "values=13: must be at most 12"),
        ({"length": 10}, "length=10: must be at least 11"),
        ({"length": 10**6}, "length=1000000: must be at most 26843"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=rf"^config\.task\.{message}$"):
        to_dataclass(Config, fields, "config.task")


def test_a_model_of_symbols_or_classes_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^config\.model\.name='mlp': this task is not for it, it has no classes$"):
        build_model({"name": "mlp"}, SMALL)
    with pytest.raises(UserError, match=r"^config\.model\.values=1: must be at least 2, as one value tells nothing$"):
        build_model({"name": "autoencoder", "values": 1}, SMALL)


@pytest.mark.breadth  # test_studies.py: the program; tests/interp/test_infomec.py: the measure
def test_a_tiny_study(monkeypatch, tmp_path):
    """Trained, read back, scored; what is finished is not done again."""
    small = {"task.values": 2, "task.length": 8, "model.latents": 3, "model.hidden": (4,), "train.batch_size": 8}
    monkeypatch.setattr(disentangle, "ARMS", {"quantized_decay": small})
    saved: list = []
    assert disentangle.study(saved.append, workdir=tmp_path, seeds=range(2, 3), steps=2) == [], "one arm, no bar"
    json.dumps(saved)
    run = load(tmp_path / "seed_2/quantized_decay", 2)
    found = disentangle.measured(run)
    sources, latents = disentangle.read(run)
    assert (sources.shape, latents.shape) == ((16, 4), (16, 3))
    assert all(len(np.unique(column)) <= 10 for column in latents.T)
    expected = infomec(sources, latents, True)
    assert (found["m"], found["c"], found["e"]) == (expected.m, expected.c, expected.e)
    assert np.shape(found["nmi"]) == (4, 3)
    assert found["nmse"] > 0
    assert saved[-1]["rows"] == [{"seed": 2, "arm": "quantized_decay", **found}]


def test_the_page_has_every_arm_and_its_null():
    null = {"m": 0.05, "c": 0.02, "e": 0.0}
    row = {"m": 0.5, "c": 0.25, "e": 0.75, "nmse": 0.0123, "active": [True, False], "nmi": [[0.5, 0.0]] * 4}
    row["shuffled"] = null
    rows = [{**row, "seed": seed, "arm": arm} for seed in (10, 11) for arm in ("plain_decay", "quantized_decay")]
    rows[1]["m"] = 0.6
    assert [bar["value"] for bar in disentangle.bars(rows)] == [0.0]
    rows[3]["m"] = 0.54
    (bar,) = disentangle.bars(rows)
    assert (round(bar["value"], 6), bar["met"]) == (0.04, False)
    arms = {row["arm"]: {} for row in rows}
    text = disentangle.section({"rows": rows, "arms": arms, "seeds": [10, 11], "steps": 5000})
    row = "| quantized + decay | 0.57 (0.54 to 0.60) | 0.05 | 0.25 (0.25 to 0.25) | 0.02 | 0.75 (0.75 to 0.75) |"
    assert f"{row} 1.0 (1.0 to 1.0) | 0.0123 (0.0123 to 0.0123) |" in text
    assert "Mean of seeds 10, 11 (least to largest), 5,000 steps." in text
    assert "quantized + decay, seed 11:" in text
    assert "| offset | 0.50 | 0.00 |" in text
    assert verdict(bar) == "NOT MET: InfoM with decay, quantized less plain: 0.040, at least 0.05"
