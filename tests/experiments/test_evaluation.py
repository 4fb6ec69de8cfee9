"""What a trained run is worth: the confusion of classes, the report of a run, and the spread over seeds."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import Stopped, UserError
from experiments.common.files import write_json
from experiments.evaluation import evaluator, examples, seeds
from experiments.evaluation.evaluator import evaluate_run, read_result, show
from experiments.evaluation.seeds import SUMMARY_FILE, run_seeds
from experiments.studies import pareto
from experiments.tasks import short_listops
from experiments.training import experiment as build_module
from experiments.training import loop, restore
from experiments.training.loop import evaluate

CLASSES = 10


@pytest.fixture
def experiment(built_light):
    """The light experiment of a seed, which every program of this file builds."""
    return built_light(seeds)


@pytest.fixture
def compiled(monkeypatch) -> list[int]:
    """The seeds that were trained, as they are."""
    seeds: list[int] = []
    original = loop._Run.compile

    def compile(run, batch):
        seeds.append(run.experiment.config.seed)
        return original(run, batch)

    monkeypatch.setattr(loop._Run, "compile", compile)
    return seeds


def test_confusion_is_the_share_of_each_class_given_each_answer():
    task = short_listops.Task(short_listops.Config(20, 1, 1), batch_size=4, seed=0)
    # Class 0 was answered by 0, 0 and 3, class 1 by 2, and class 9, in a row of weight 0, by 9.
    batches = [([0, 0, 1, 9], [0, 3, 2, 9], [1, 1, 1, 0]), ([0, 9, 9, 9], [0, 9, 9, 9], [1, 0, 0, 0])]

    def evaluate_batch(_, batch):
        targets, answers, weights = map(jnp.asarray, batch)
        output = SimpleNamespace(logits=jax.nn.one_hot(answers, CLASSES) * 3)
        return task.evaluation_metrics(output, {"targets": targets, "weights": weights.astype(jnp.float32)})

    found = np.array(evaluate(evaluate_batch, None, iter(batches))["confusion"])
    assert found.shape == (CLASSES, CLASSES)
    np.testing.assert_allclose(found[0], [2 / 3, 0, 0, 1 / 3, 0, 0, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], np.eye(CLASSES)[2])
    assert np.isnan(found[2:]).all(), "classes that do not occur"


@pytest.mark.breadth  # test_confusion_is_the_share_of_each_class_given_each_answer
def test_the_confusion_of_a_run_is_that_of_its_answers(experiment, tiny, tmp_path, capsys):
    built = experiment(tiny())
    loop.train(built, tmp_path)
    result = evaluate_run(tmp_path, "validation")
    variables = restore.load(tmp_path).variables
    counts, right = np.zeros((CLASSES, CLASSES)), 0
    for batch in built.task.evaluation_batches("validation"):
        logits = built.model.apply(variables, batch["inputs"], batch["lengths"]).logits
        for target, answer, weight in zip(batch["targets"], logits.argmax(1), batch["weights"], strict=True):
            counts[target, answer] += weight
            right += weight * (target == int(answer))
    assert counts.sum() == 40
    for row, expected in zip(result["confusion"], counts, strict=True):
        if expected.sum() == 0:
            assert row == [None] * CLASSES
        else:
            assert math.isclose(sum(row), 1, rel_tol=1e-6)
            np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-6)
    assert result["accuracy"] == pytest.approx(right / 40)
    assert result["baseline"] == {"accuracy": counts.sum(1).max() / 40}
    assert result["per_class"]["support"] == counts.sum(1).tolist()
    for number, (precision, recall) in enumerate(
        zip(result["per_class"]["precision"], result["per_class"]["recall"], strict=True)
    ):
        hit = counts[number, number]
        assert precision == (pytest.approx(hit / counts[:, number].sum()) if counts[:, number].any() else None)
        assert recall == (pytest.approx(hit / counts[number].sum()) if counts[number].any() else None)
    file = tmp_path / f"evaluation_validation_{result['step']}.json"
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))

    capsys.readouterr()
    show(result)
    lines = capsys.readouterr().out.splitlines()
    assert f"short_listops, validation split, step {result['step']}" in lines[0]
    (line,) = [line for line in lines if "always the most common class" in line]
    assert f"{result['baseline']['accuracy']:.4f}" in line
    matrix = lines[next(i for i, line in enumerate(lines) if "confusion matrix" in line) :]
    cells = [line.replace("│", " ").split() for line in matrix]
    for number, row in enumerate(result["confusion"]):
        wanted = ["-" if share is None else f"{100 * share:.0f}" for share in row]
        assert [str(number), *wanted] in cells
    each = [line.replace("│", " ").split() for line in lines]
    for number, row in enumerate(zip(*result["per_class"].values(), strict=True)):
        name, *shares, support = ["-" if value is None else value for value in row]
        assert name == str(number)
        assert [name, *(s if s == "-" else f"{s:.4f}" for s in shares), f"{support:.0f}"] in each
    (line,) = [line for line in lines if line.replace("│", " ").split()[:1] == ["accuracy"]]
    assert f"{result['standard_errors']['accuracy']:.4f}" in line


@pytest.mark.breadth  # test_fewer_bits_are_compared_with_the_same_run_in_float32
def test_a_run_against_another_and_itself(experiment, tiny, tmp_path, capsys):
    for seed in (0, 1):
        loop.train(experiment(tiny({"seed": seed})), tmp_path / str(seed))
    result = evaluate_run(tmp_path / "0", against=tmp_path / "1")
    there = evaluate_run(tmp_path / "1")
    found = result["against"]["metrics"]
    assert result["examples_sha256"] == there["examples_sha256"]
    assert result["examples"] == 40
    for name in ("loss", "accuracy"):
        assert found[name]["here"] == pytest.approx(result[name], rel=1e-5)
        assert found[name]["there"] == pytest.approx(there[name], rel=1e-5)
        assert found[name]["difference"] == pytest.approx(result[name] - there[name], abs=1e-6)
    alone = found["accuracy"]["right_here_alone"] - found["accuracy"]["right_there_alone"]
    assert found["accuracy"]["difference"] == pytest.approx(alone / 40)
    assert found["loss"]["test"] == "paired t test"
    assert 0 < found["loss"]["p_value"] < 1
    file = json.loads((tmp_path / "0" / f"evaluation_test_{result['step']}.json").read_text())
    assert file == json.loads(json.dumps(result))
    capsys.readouterr()
    show(result)
    first, second = result["against"]["verdicts"]
    assert capsys.readouterr().out.splitlines()[-3:] == [first, second, "here -> there: config.seed: 0 -> 1"]
    assert "in accuracy" in first
    assert "in loss" in second

    assert result["best"]
    step = evaluate_run(tmp_path / "0", step=result["step"])
    assert step["best"], "asked for by its number or not"
    same = evaluate_run(tmp_path / "0", against=tmp_path / "0")["against"]
    assert [metric["p_value"] for metric in same["metrics"].values()] == [1, 1]
    assert [line.split(":")[0] for line in same["verdicts"]] == [
        "no significant difference in accuracy",
        "no significant difference in loss",
    ]


def test_throughput_leaves_the_first_batch_out(experiment, tiny, tmp_path, monkeypatch):
    """Of five batches of 8 the last four are timed; one batch alone says nothing."""
    loop.train(experiment(tiny()), tmp_path)
    run = restore.load(tmp_path)
    lengths = np.concatenate([batch["lengths"] for batch in run.experiment.task.evaluation_batches("test")])
    clock = iter((10.0, 12.0, 20.0, 23.0))
    monkeypatch.setattr(examples, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = examples.score(run, "test").throughput
    assert found == {"examples_per_second": 32 / 2, "elements_per_second": pytest.approx(lengths[8:].sum() / 2)}
    whole = run.experiment.task.evaluation_batches
    monkeypatch.setattr(run.experiment.task, "evaluation_batches", lambda split: iter([next(whole(split))]))
    assert examples.score(run, "test").throughput == dict.fromkeys(found)


def check_spread(summary: dict, name: str, values: list[float]) -> None:
    spread, n = summary["metrics"][name], len(values)
    assert spread["values"] == values
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    assert spread["mean"] == pytest.approx(mean, rel=1e-9)
    assert spread["standard_deviation"] == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert spread["standard_error"] == pytest.approx(math.sqrt(variance / n), rel=1e-9)


@pytest.mark.breadth  # test_a_summary_is_shown_though_it_cannot_be_written
def test_seeds_are_trained_once_and_summed_up(experiment, compiled, tiny, tmp_path):
    values = tiny({"seed": 3})
    run_seeds(values, tmp_path, 1)
    assert compiled == [3]
    first = (tmp_path / "seed_3" / "metrics.jsonl").read_bytes()
    summary = run_seeds(values, tmp_path, 2)
    assert compiled == [3, 4], "finished seeds are reused"
    assert (tmp_path / "seed_3" / "metrics.jsonl").read_bytes() == first

    assert json.loads((tmp_path / SUMMARY_FILE).read_text()) == json.loads(json.dumps(summary))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed_3", "seed_4", SUMMARY_FILE]
    assert summary["seeds"] == [3, 4]
    assert summary["steps"] == [
        json.loads(path.read_text())["step"] for path in sorted(tmp_path.glob("*/evaluation_*"))
    ]
    assert summary["seals"] == [
        evaluator.seal(tmp_path / f"seed_{seed}", step)
        for seed, step in zip(summary["seeds"], summary["steps"], strict=True)
    ]
    assert not {"step", "seal"} & set(summary["metrics"])
    assert summary["split"] == "test"
    assert summary["config"] == values
    assert summary["selection_metric"] == "accuracy"
    runs = [json.loads(next((tmp_path / f"seed_{n}").glob("evaluation_test_*.json")).read_text()) for n in (3, 4)]
    for name in ("loss", "accuracy"):
        check_spread(summary, name, [run[name] for run in runs])
    assert len(set(summary["metrics"]["loss"]["values"])) == 2, "each seed is another run"
    assert summary["activation_rate"] == [run["activation_rate"] for run in runs]
    assert "confusion" not in summary["metrics"]


def test_fewer_bits_are_compared_with_the_same_run_in_float32(experiment, tiny, tmp_path):
    """This model of one table has no kernel: both evaluations are equal."""
    loop.train(experiment(tiny()), tmp_path)
    result = evaluate_run(tmp_path, parameter_dtype="int8")
    assert result["against"]["workdir"] == str(tmp_path)
    assert result["against"]["differences"] == ["parameter_dtype: int8 -> float32"]
    assert result["against"]["metrics"]["loss"]["difference"] == 0
    assert (tmp_path / f"evaluation_test_{result['step']}_int8.json").is_file()


@pytest.mark.breadth  # test_a_study_that_is_asked_to_stop_trains_no_further
@pytest.mark.parametrize("seed", [3, 4])
def test_seeds_that_are_asked_to_stop_have_no_summary(experiment, tiny, tmp_path, monkeypatch, seed):
    """Neither is the next seed trained, nor is what was stopped evaluated; the same call resumes."""
    values, trained, train = tiny({"seed": 3}), [], seeds.train

    def stopped(experiment, workdir, init_from):
        trained.append(experiment.config.seed)
        ended = train(experiment, workdir, init_from)
        return ended._replace(step=5, stopped=True) if experiment.config.seed == seed else ended

    monkeypatch.setattr(seeds, "train", stopped)
    with pytest.raises(Stopped, match=rf"^asked to stop: seed {seed} is at step 5 of 6; no summary is written"):
        run_seeds(values, tmp_path, 3)
    assert trained == list(range(3, seed + 1))
    assert not (tmp_path / SUMMARY_FILE).exists()
    assert not list((tmp_path / f"seed_{seed}").glob("evaluation_*"))
    monkeypatch.setattr(seeds, "train", train)
    assert run_seeds(values, tmp_path, 2)["seeds"] == [3, 4]


def test_a_study_that_is_asked_to_stop_trains_no_further(monkeypatch, tmp_path):
    saved, trained = [], []
    monkeypatch.setattr(pareto, "test", lambda *_: {"accuracy": 1.0})

    def train(experiment, workdir, init_from):
        trained.append(workdir.name)
        return loop.Finished(step=7, stopped=len(trained) == 3)

    monkeypatch.setattr(seeds, "train", train)
    monkeypatch.setattr(pareto, "build", lambda values: SimpleNamespace(config=build_module.read_config(values)))
    with pytest.raises(Stopped, match=r"^asked to stop: pareto_copy_separate_0\.25_0 is at step 7 of 2400;"):
        pareto.compare("pareto_copy", saved.append, seeds=range(2), workdir=tmp_path)
    assert trained == [f"pareto_copy_{name}_0" for name in ("mip", "separate_0.0", "separate_0.25")]
    assert len(saved) == 1


def test_a_summary_is_shown_though_it_cannot_be_written(experiment, tiny, tmp_path):
    run_seeds(tiny(), tmp_path, 1)
    (tmp_path / SUMMARY_FILE).unlink()
    (tmp_path / SUMMARY_FILE).mkdir()
    shown = []
    with pytest.raises(UserError, match=f"could not write {tmp_path}/{SUMMARY_FILE}: Is a directory"):
        run_seeds(tiny(), tmp_path, 1, shown=shown.append)
    assert shown[0]["seeds"] == [0]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.breadth  # test_a_summary_is_shown_though_it_cannot_be_written
def test_a_single_seed_has_no_spread(experiment, tiny, tmp_path):
    summary = run_seeds(tiny(), tmp_path, 1, "validation")
    assert summary["split"] == "validation"
    loss = summary["metrics"]["loss"]
    assert loss["standard_deviation"] is None
    assert loss["standard_error"] is None
    assert loss["mean"] == loss["values"][0]


def test_a_result_is_of_one_checkpoint(experiment, tiny, tmp_path, caplog):
    for name, changes in (("a", {}), ("b", {"seed": 1})):
        loop.train(experiment(tiny(changes)), tmp_path / name)
    result = evaluate_run(tmp_path / "a", step=6)
    file = tmp_path / "a" / "evaluation_test_6.json"
    assert result["seal"] == examples.hashlib.sha256((tmp_path / "a/checkpoints/6/seal.json").read_bytes()).hexdigest()
    assert read_result(file, tmp_path / "a") == json.loads(json.dumps(result))
    assert read_result(tmp_path / "a" / "evaluation_test_4.json", tmp_path / "a") is None
    assert not caplog.records
    assert read_result(file, tmp_path / "b") is None, "of another run"
    for changes in ({"seal": None}, {"seal": ""}, {"step": 4}, {"step": "6"}, {"step": 5, "seal": ""}):
        file.write_text(json.dumps({**result, **changes}))
        assert read_result(file, tmp_path / "a") is None
    assert len(caplog.records) == 6
    for text in ("{", "[]", "\xff", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UserError, match=r"evaluation_test_6\.json is damaged"):
            read_result(file, tmp_path / "a")


def test_whatever_is_not_finite_is_null(tmp_path):
    write_json(tmp_path / "a.json", {"config": {"x": math.inf, "y": (1.0, math.nan)}, "text": "\udcff", 3: True})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"config": {"x": None, "y": [1.0, None]}, "text": "\udcff", "3": True}


def test_a_result_that_cannot_be_kept_is_not_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluator, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"could not write in {tmp_path}/file: Not a directory"):
        evaluate_run(tmp_path / "file")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"could not write {tmp_path}/file/seeds.json"):
        write_json(tmp_path / "file" / "seeds.json", {})


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        write_json(tmp_path / "seeds.json", process)
    assert (tmp_path / "seeds.json").read_text() == "0\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_two_programs_may_write_one_file(tmp_path, monkeypatch):
    """One comes in between another's writing and its renaming."""
    path, replace = tmp_path / "result.json", Path.replace

    def interrupted(partial, target):
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_json(path, {"by": "the other"})
        assert json.loads(path.read_text()) == {"by": "the other"}
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    write_json(path, {"by": "the one"})
    assert json.loads(path.read_text()) == {"by": "the one"}
    assert list(tmp_path.iterdir()) == [path]
