"""Classifiers by prototypes: a tiny run is trained, evaluated and reported, and its cases are the nearest examples."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import base
from experiments.common.errors import UserError
from experiments.evaluation.evaluator import evaluate_run
from experiments.evaluation.prototypes import cases, look
from experiments.reports import pictures
from experiments.reports.writer import write_report
from experiments.studies import prototypes as study
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE
from experiments.training.models import build_model
from experiments.training.restore import load
from tests.experiments.test_report import BLANK, assert_page
from tests.test_readme import ROOT, python_blocks

HEAD = {"count": 3, "size": 2}


def values_of(tiny):
    """Without attention, which compiles faster."""
    values = tiny({"model.activation": "never", "model.layers": 1, "train.steps": 2, "train.evaluate_every": 2})
    return {**values, "model": {**values["model"], "head": base.head("prototypes", **HEAD).to_dict()}}


def test_the_lines_of_the_guide():
    """The block of docs/prototypes.md; what it says about a run's cases is text."""
    names: dict = {}
    (block,) = python_blocks((ROOT / "docs/prototypes.md").read_text())
    exec(block, names)
    model = names["config"].to_dict()["model"]
    assert build_model(model, SimpleNamespace(classes=2, vocabulary_size=256, length=64)).config.head.count == 8


@pytest.mark.breadth  # tests/models/test_prototypes.py: the head; test_report.py: the page
def test_a_tiny_run_is_trained_evaluated_and_reported(tiny, tmp_path, monkeypatch):
    train(build(values_of(tiny)), tmp_path)
    records = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    terms = {f"term/{name}" for name in ("reconstruction", "nearest_example", "nearest_prototype")}
    stated = [row for row in records if row["kind"] == "train"]
    assert stated
    assert all(row[name] > 0 for row in stated for name in terms)
    assert 0 <= evaluate_run(tmp_path)["accuracy"] <= 1

    run = load(tmp_path)
    found = cases(run)
    assert (found.looked, found.total) == (200, 200)
    head = jax.tree.map(np.asarray, run.variables["params"]["head"])
    examples = [run.task.row(run.task._sources["train"][number]) for number in range(200)]
    size = run.experiment.config.train.batch_size  # a shape that is compiled
    parts = [examples[first : first + size] for first in range(0, 200, size)]
    batches = [[np.stack([row[name] for row in part]) for name in ("inputs", "lengths")] for part in parts]
    z = np.concatenate([look(run.model, run.variables, *batch)[0] for batch in batches]).astype(np.float64)
    distances = np.square(z[:, None] - head["prototypes"][None]).sum(-1)
    np.testing.assert_allclose([case.distance for case in found.cases], distances.min(0), rtol=1e-4)
    np.testing.assert_allclose(found.variance, z.var(0).sum(), rtol=1e-4)
    np.testing.assert_allclose(found.closeness, distances.min(0).mean() / z.var(0).sum(), rtol=1e-4)
    for j, case in enumerate(found.cases):
        assert distances[case.number, j] == pytest.approx(distances[:, j].min(), rel=1e-4)
        np.testing.assert_array_equal(case.example["inputs"], examples[case.number]["inputs"])
        assert case.target == examples[case.number]["targets"]
        assert case.vote == head["votes"][j].argmin()
    assert found.agreement == np.mean([case.vote == case.target for case in found.cases])

    monkeypatch.setattr(pictures, "_uri", lambda figure: pictures.plt.close(figure) or BLANK)
    text = " ".join("".join(assert_page(write_report(tmp_path, examples=5)).text).split())
    assert "Classified like these" in text
    assert "by squared distances to 3 prototypes" in text
    assert "among 200 of 200" in text
    for case in found.cases:
        assert f"votes for {case.vote}: training example {case.number + 1}, class {case.target}" in text
        shown = case.example["inputs"][: case.example["lengths"]]
        assert "".join(map(run.task.symbol, shown.tolist())).strip() in text


def test_a_run_without_prototypes_is_refused():
    run = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(head="mlp")), origin="runs/x")
    with pytest.raises(
        UserError, match=r"^runs/x has no prototypes: train a classifier with config\.model\.head\.name="
    ):
        cases(run)


def test_training_examples_are_evenly_spaced_and_held_once(tiny):
    task = build(tiny()).task
    for most, expected in ((3, [0, 100, 199]), (500, range(200))):
        numbers, batches = task.train_examples(most)
        assert numbers.tolist() == list(expected)
        rows = [row for batch in batches for row in batch["inputs"][batch["weights"] > 0]]
        wanted = [task.row(task._sources["train"][number])["inputs"] for number in expected]
        np.testing.assert_array_equal(rows, wanted)


def test_bars_are_of_the_worst_seed():
    row = lambda arm, seed, **fields: {"arm": arm, "seed": seed, **fields}
    rows = [
        row("prototypes", 10, accuracy=0.97, closeness=0.02, agreement=0.9),
        row("linear", 10, accuracy=0.96),
        row("without_nearest_example", 10, accuracy=0.98, closeness=0.2, agreement=0.1),
        row("prototypes", 11, accuracy=0.95, closeness=0.06, agreement=1.0),
        row("linear", 11, accuracy=0.97),
        row("without_nearest_example", 11, accuracy=0.97, closeness=0.18, agreement=0.1),
    ]
    assert study.bars(rows[:2]) == []
    found = study.bars(rows)
    np.testing.assert_allclose([bar["value"] for bar in found], [-0.02, 0.06, 3.0, 0.9])
    assert [bar["met"] for bar in found] == [False, False, False, True]
    assert [bar["met"] for bar in study.bars(rows[:3])] == [True] * 4
    section = study.section({"rows": rows})
    assert "| prototypes | 0.960 (0.950 to 0.970) | 0.040 (0.020 to 0.060) | 0.95 (0.90 to 1.00) |" in section
    assert "| linear head | 0.965 (0.960 to 0.970) |  |  |" in section


@pytest.mark.slow
def test_a_tiny_study(tmp_path):
    saved = []
    bars = study.study(lambda result: saved.append(json.dumps(result)), workdir=tmp_path, seeds=range(3, 4), steps=2)
    result = json.loads(saved[-1])
    assert result["bars"] == json.loads(json.dumps(bars))
    assert [row["arm"] for row in result["rows"]] == list(study.HEADS)
    assert len(saved) == 3
