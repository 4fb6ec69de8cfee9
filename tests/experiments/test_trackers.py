"""Trackers: what each library is told, in stand-ins that need no installation, and the same run when resumed."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from absl import logging

from experiments.common.errors import UserError
from experiments.training.metrics import METRICS_FILE, MetricsFile, Reporter
from experiments.training.trackers import PACKAGES, TRACKERS_FILE

CONFIG = {"seed": 3, "train": {"steps": 100, "trackers": ("wandb",)}}


class FakeRun:
    """A run of Weights & Biases. Resumed, it begins after the last step that the server has; offline, at 0."""

    offline = False

    def __init__(self, last: dict[str, int], **settings: Any):
        self.settings, self._last, self.finished = settings, last, False
        self.step = 0 if self.offline else last.get(settings["id"], -1) + 1
        self.logged: list[tuple[int, dict]] = []

    def log(self, values: dict, step: int) -> None:
        assert step >= self.step
        self.step = self._last[self.settings["id"]] = step
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> list[FakeRun]:
    """The runs that are begun or continued."""
    runs: list[FakeRun] = []
    last: dict[str, int] = {}
    module: Any = types.ModuleType("wandb")
    module.Settings = lambda **settings: settings
    module.init = lambda **settings: runs.append(FakeRun(last, **settings)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return runs


class FakeClient:
    """A client of MLflow, with its server's limits on names and batches."""

    servers: dict[str, dict[str, Any]] = {}

    def __init__(self, uri: str):
        self.server = self.servers.setdefault(uri, {"experiments": {}, "runs": {}})

    def get_experiment_by_name(self, name: str) -> Any:
        number = self.server["experiments"].get(name)
        return None if number is None else types.SimpleNamespace(experiment_id=number)

    def create_experiment(self, name: str) -> str:
        return self.server["experiments"].setdefault(name, str(len(self.server["experiments"])))

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        run = {"experiment": experiment_id, "name": run_name, "metrics": [], "params": {}, "status": "RUNNING"}
        number = f"run{len(self.server['runs'])}"
        self.server["runs"][number] = run
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=number))

    def update_run(self, run_id: str, status: str) -> None:
        self.server["runs"][run_id]["status"] = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        assert all(len(value) <= 500 for _, value in params)
        self.server["runs"][run_id]["metrics"] += [(key, value, step) for key, value, _, step in metrics]
        self.server["runs"][run_id]["params"] |= dict(params)

    def set_terminated(self, run_id: str) -> None:
        self.server["runs"][run_id]["status"] = "FINISHED"


@pytest.fixture
def mlflow(monkeypatch) -> type[FakeClient]:
    FakeClient.servers = {}
    module: Any = types.ModuleType("mlflow")
    module.MlflowClient = FakeClient
    entities: Any = types.ModuleType("mlflow.entities")
    entities.Metric, entities.Param = (lambda *fields: fields), (lambda *fields: fields)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return FakeClient


def report(workdir: Path, steps: range, *trackers: str, start: int = 0, index: int = 0) -> None:
    settings: Any = {"total_steps": 100, "start_step": start, "process_index": index, "config": CONFIG}
    with Reporter(workdir, trackers=trackers, **settings) as reporter:
        for step in steps:
            reporter.train(step, {"loss": 1 / step, "activation_rate": [0.5, 0.25]})
        reporter.evaluation(step, "validation", {"loss": 0.5, "confusion": [[1.0]]})


def test_wandb_gets_every_scalar(tmp_path, wandb):
    report(tmp_path / "x", range(1, 3), "wandb")
    (run,) = wandb
    assert run.settings["project"] == "seqboat"
    assert run.settings["name"] == "x"
    assert run.settings["config"] == CONFIG
    assert run.settings["dir"] == str(tmp_path / "x")
    scalars = lambda step: {"loss": 1 / step, "activation_rate/layer_0": 0.5, "activation_rate/layer_1": 0.25}
    assert run.logged == [(1, scalars(1)), (2, scalars(2)), (2, {"validation/loss": 0.5})]
    assert run.finished


def test_a_resumed_run_is_the_same_one(tmp_path, wandb, mlflow):
    """Killed after step 4, resumed from step 2: what is repeated reaches wandb once."""
    report(tmp_path, range(1, 5), "wandb", "mlflow")
    report(tmp_path, range(3, 7), "wandb", "mlflow", start=2)
    first, again = wandb
    assert again.settings["id"] == first.settings["id"]
    assert again.settings["resume"] == "allow"
    assert [step for step, _ in again.logged] == [5, 6, 6]
    ((server,),) = ([mlflow.servers[uri]] for uri in mlflow.servers)
    (run,) = server["runs"].values()
    assert [step for key, _, step in run["metrics"] if key == "loss"] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert run["status"] == "FINISHED"
    assert run["params"] == {
        "config.seed": "3",
        "config.train.steps": "100",
        "config.train.trackers": "('wandb',)",
    }
    assert json.loads((tmp_path / TRACKERS_FILE).read_text()) == {"wandb": first.settings["id"], "mlflow": "run0"}


def test_a_resumed_offline_run_has_all_steps(tmp_path, wandb, monkeypatch):
    """Offline a resumed run is a second folder of the same one, and of two folders the server keeps one."""
    monkeypatch.setattr(FakeRun, "offline", True)
    with Reporter(tmp_path, total_steps=100, start_step=0, process_index=0, trackers=("wandb",)) as reporter:
        reporter.train(1, {"loss": float("nan"), "activation_rate": [0.5, float("inf")]})
        reporter.evaluation(1, "test", {"loss": 2.0, "confusion": [[1.0]]})
        reporter.train(2, {"loss": 0.5})
    report(tmp_path, range(2, 4), "wandb", start=1)
    first, again = wandb
    assert again.settings["id"] == first.settings["id"]
    assert [step for step, _ in again.logged] == [1, 1, 2, 3, 3]
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert [scalars for _, scalars in again.logged[:2]] == [
        {"loss": nan, "activation_rate/layer_0": 0.5, "activation_rate/layer_1": nan},
        {"test/loss": 2.0},
    ]


def test_a_run_from_the_beginning_is_a_new_one(tmp_path, wandb):
    report(tmp_path, range(1, 2), "wandb")
    report(tmp_path, range(1, 2), "wandb")
    assert len({run.settings["id"] for run in wandb}) == 2


def test_mlflow_is_in_the_work_directory_or_where_it_is_told(tmp_path, mlflow, monkeypatch):
    report(tmp_path, range(1, 2), "mlflow")
    assert list(mlflow.servers) == [f"sqlite:///{tmp_path / 'mlflow.db'}"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    report(tmp_path, range(1, 2), "mlflow")
    assert "http://localhost:5000" in mlflow.servers


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(UserError, match=f"{name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}"):
        report(tmp_path, range(1, 2), name)
    report(tmp_path, range(1, 2))  # not imported unless asked for


def test_no_account_is_one_line(tmp_path, wandb, monkeypatch):
    def refuse(**settings: Any) -> None:
        raise RuntimeError("api_key not configured\nmore lines")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError) as caught:
        report(tmp_path, range(1, 2), "wandb")
    assert "wandb cannot be opened: api_key not configured; WANDB_MODE=offline needs no account" in str(caught.value)


def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path, wandb, mlflow, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(FakeRun, "log", lost)
    report(tmp_path, range(1, 4), "wandb", "mlflow")
    assert warnings == ["wandb failed (the server is gone); training continues without it"]
    assert len(list(MetricsFile(tmp_path / METRICS_FILE).records())) == 4
    ((server,),) = ([mlflow.servers[uri]] for uri in mlflow.servers)
    assert len(server["runs"]["run0"]["metrics"]) == 10


def test_other_processes_open_none(tmp_path, wandb):
    report(tmp_path, range(1, 2), "wandb", index=1)
    assert wandb == []


def test_a_damaged_file_of_names_is_one_line(tmp_path, wandb):
    (tmp_path / TRACKERS_FILE).write_text("[")
    with pytest.raises(UserError, match=r"trackers\.json is damaged .*: remove it"):
        report(tmp_path, range(3, 4), "wandb", start=2)
