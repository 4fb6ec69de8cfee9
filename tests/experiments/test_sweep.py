"""A sweep: which runs it does, in which order, from which seeds, and what it leaves to other processes."""

import copy
import json

import pytest

from configs.sweeps import (
    codes,
    coupled_series,
    depth,
    gliding_digits,
    induction,
    mixers,
    mqar,
    quickstart,
    selective_copy,
    target_rate,
    transformers,
)
from configs.synthetic import codes as recipe
from experiments.common.config import to_dataclass
from experiments.common.errors import UserError
from experiments.evaluation import seeds
from experiments.evaluation.evaluator import evaluate_run
from experiments.evaluation.table import curve, read_run, show, write
from experiments.studies import sweep
from experiments.studies.sweep import FIRST_TUNING_SEED, Sweep
from experiments.training import claims
from experiments.training.experiment import build
from experiments.training.metrics import METRICS_FILE


def make(arms, **fields):
    return to_dataclass(Sweep, {"arms": arms, **fields}, "config")


@pytest.fixture
def experiment(built_light):
    """Every arm is the light experiment."""
    return built_light(seeds, sweep)


@pytest.fixture
def done(monkeypatch):
    """The runs that were done, as (arm, learning rate, seed, split); their validation score is that of `score`."""
    runs, results = [], {}

    def run_seed(values, directory, split="test"):
        rate = values["optimizer"]["learning_rate"]
        runs.append((directory.parts[-3 if split == "validation" else -2], rate, values["seed"], split))
        results[directory] = {"selection_metric": "accuracy", "accuracy": run_seed.score(values)}

    monkeypatch.setattr(sweep, "run_seed", run_seed)
    monkeypatch.setattr(sweep, "finished", lambda values, directory, split: results.get(directory))
    monkeypatch.setattr(sweep, "run_seeds", lambda values, directory, count: runs.append((directory.name, count)))
    runs.append(run_seed)
    return runs


def test_arms_are_run_seed_by_seed(done, tiny, tmp_path):
    done.pop().score = lambda values: 0.0
    found = sweep.run(make({"a": tiny(), "b": tiny()}, first_seed=7, seeds=2), tmp_path)
    rate = tiny()["optimizer"]["learning_rate"]
    assert done == [*((arm, rate, seed, "test") for seed in (7, 8) for arm in "ab"), ("a", 2), ("b", 2)]
    assert found == {"a": tmp_path / "a", "b": tmp_path / "b"}


def test_each_arm_takes_its_best_rate_on_other_seeds(done, tiny, tmp_path):
    """Of arm b, whose rate 0.1 is best on one seed, that seed's score is not finite."""
    other = tiny({"train.steps": 8})

    def score(values):
        rate, is_b = values["optimizer"]["learning_rate"], values["train"]["steps"] == 8
        if is_b and rate == 0.1:
            return 0.9 if values["seed"] == FIRST_TUNING_SEED else None
        return rate if not is_b else 0.5 - rate

    done.pop().score = score
    sweep.run(make({"a": tiny(), "b": other}, seeds=1, learning_rates=(0.001, 0.01, 0.1)), tmp_path)
    assert len([run for run in done if run[-1] == "validation"]) == 2 * 3 * 2
    assert {run[2] for run in done if run[-1] == "validation"} == {FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1}
    assert [run for run in done if run[-1] == "test"] == [("a", 0.1, 0, "test"), ("b", 0.001, 0, "test")]


def test_no_finite_rate_is_one_line(done, tiny, tmp_path):
    done.pop().score = lambda values: None
    with pytest.raises(UserError, match=r"arm a: no learning rate of \(0.1, 0.2\) gave finite scores"):
        sweep.run(make({"a": tiny()}, learning_rates=(0.1, 0.2)), tmp_path)


@pytest.mark.breadth  # test_evaluation.py: seeds of one process
def test_a_run_of_another_process_is_left_to_it_and_the_last_writes_the_table(experiment, tiny, tmp_path, capsys):
    table = make({"a": tiny(), "b": tiny()}, first_seed=3, seeds=1)
    with claims.owned(tmp_path / "a" / "seed_3"):
        assert sweep.run(table, tmp_path) is None
    assert json.loads(next((tmp_path / "b" / "seed_3").glob("evaluation_test_*")).read_text())["best"]
    assert not (tmp_path / "b" / "seeds.json").exists()
    directories = sweep.run(table, tmp_path)
    runs = {name: read_run(path) for name, path in directories.items()}
    write(runs, tmp_path / "table")
    capsys.readouterr()
    show(runs)
    row = next(line for line in capsys.readouterr().out.splitlines() if " b " in line)
    assert f"{runs['b']['metrics']['accuracy']['mean']:.4f}" in row
    found = json.loads((tmp_path / "table.json").read_text())
    assert list(found) == ["a", "b"]
    assert found["a"]["seeds"] == [3]
    assert found["a"]["metrics"]["accuracy"] == found["b"]["metrics"]["accuracy"]
    before = next((tmp_path / "b" / "seed_3").glob("evaluation_test_*")).stat().st_mtime_ns
    sweep.run(table, tmp_path)
    assert next((tmp_path / "b" / "seed_3").glob("evaluation_test_*")).stat().st_mtime_ns == before


def test_the_curve_is_of_the_metric_of_its_task_and_of_the_steps_that_have_it(tmp_path):
    records = [{"step": 1, "loss": 2.0, "bits_per_token": 4.5}, {"step": 2, "loss": 1.0}]
    assert curve(records, "bits_per_token") == ([1], [4.5])
    run = {"test": [{"selection_metric": "bits_per_token"}], "curve": {"train": records, "evaluation": records[:1]}}
    write({"a": run}, tmp_path / "table")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.breadth  # test_the_curve_is_of_the_metric_of_its_task_and_of_the_steps_that_have_it
def test_a_table_keeps_the_metric_of_its_task(untrained, tmp_path):
    config = recipe.get_config("tiny")
    config.task.update(length=4, coarse=2, fine=2, edges=1, choices=1, test_examples=4)
    workdir = untrained(config.to_dict(), tmp_path / "run")
    result = evaluate_run(workdir, "test")
    (workdir / f"evaluation_test_{result['step']}.json").write_text(json.dumps(result))
    lines = [{"kind": "train", "step": 1, "loss": 2.0, "bits_per_token": 4.5, "seconds": 1.0, "elements": 3.0}]
    (workdir / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(workdir)["curve"]["train"] == [{"step": 1, "loss": 2.0, "bits_per_token": 4.5}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 0}, "seeds=0: must be at least 1"),
        ({"first_seed": -1}, "first_seed=-1: must be at least 0"),
        ({"arms": {}}, "must have at least one"),
        ({"arms": {"../x": {}}}, r"arms\.\.\./x: letters, digits and underscores only"),
        ({"arm": {}}, "arm: unknown field"),
    ],
)
def test_mistakes_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        make(**{"arms": {"a": {}}, **fields})


def test_a_mistake_in_an_arm_is_found_before_the_first_run(tiny):
    wrong = copy.deepcopy(tiny())
    wrong["model"]["window_size"] = -1
    with pytest.raises(UserError, match=r"arm b: config\.model\.window_size=-1"):
        make({"a": tiny(), "b": wrong}).check()


def test_the_sweeps_of_the_documentation_are_valid():
    for module in (mqar, quickstart, selective_copy):
        table = to_dataclass(Sweep, module.get_config().to_dict(), "config")
        table.check()
    rates = {name: values["model"]["activation_rate"] for name, values in table.arms.items()}
    assert {name for name, rate in rates.items() if rate == 0.4} == {"strided", "random"}
    assert table.arms["target_rate"]["model"]["router"]["target_rate"] == 0.4


@pytest.mark.breadth
@pytest.mark.parametrize("module", [codes, coupled_series, gliding_digits, induction, mixers, transformers])
def test_the_sweeps_of_other_systems_are_valid(module):
    if module is gliding_digits:
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    table = to_dataclass(Sweep, module.get_config().to_dict(), "config")
    table.check()
    assert (table.seeds, table.learning_rates) == (5, ())


def test_the_arms_of_depth_are_configs_of_their_own():
    table = to_dataclass(Sweep, depth.get_config().to_dict(), "config")
    table.check()
    assert table.arms["selu"] == depth.get_config("selu").to_dict()
    assert {len(arm["model"]["hidden"]) for arm in table.arms.values()} == {4, 32}


def test_the_sweeps_of_target_rates_are_valid(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    (tmp_path / "text").write_bytes(b"some letters " * 100)
    for data in ("copying", "digits", str(tmp_path / "text")):
        table = to_dataclass(Sweep, target_rate.get_config(data).to_dict(), "config")
        build(table.arms["asked_0_1"])
        asked = [arm["model"]["router"] for arm in table.arms.values()]
        assert [router["target_rate"] for router in asked] == [0.1, 0.25, 0.5, 0.75]
        assert {router["rate_control"] for router in asked} == {"exact"}
