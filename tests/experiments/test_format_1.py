"""A run that was written in checkpoint format 1, of step 6, is evaluated to the same numbers and resumed."""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.evaluation.evaluator import measure_run
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE
from experiments.training.restore import load
from seqboat.version import CHECKPOINT_FORMAT, migrate

ARCHIVE = Path(__file__).parents[1] / "golden" / "format_1.zip"
# What format 1 wrote of the test split at step 6, and, resumed, of the training and validation at step 8.
TEST = {"bits_per_byte": 8.353382110595703, "loss": 5.790122985839844, "accuracy": 0.0}
TRAINED = {"bits_per_byte": 8.31335735321045, "gradient_norm": 1.1356627941131592}
VALIDATED = {"bits_per_byte": 8.02768611907959, "accuracy": 0.033557046204805374}


@pytest.fixture
def old(tmp_path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def old_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/checkpoints/6/meta/metadata").read_text())


def test_is_loaded_with_its_parameters(old):
    run = load(old / "run", data_dir=str(old))
    assert (run.step, run.best) == (6, True)
    assert run.values["task"]["carry_state"] is True
    assert run.task.bytes["test"].size
    assert sum(np.any(leaf) for leaf in jax.tree.leaves(run.variables["params"])) > 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables))


@pytest.mark.breadth  # test_is_loaded_with_its_parameters; golden/test_export.py: that such parameters compute the same
def test_evaluates_to_the_same_numbers(old):
    result = measure_run(old / "run", data_dir=str(old))
    assert {name: result[name] for name in TEST} == pytest.approx(TEST, rel=1e-5)
    assert result["step"] == 6
    assert result["selection_metric"] == "bits_per_byte"
    assert result["config"]["task"]["carry_state"] is True


@pytest.mark.breadth  # test_is_loaded_with_its_parameters
def test_its_whole_state_is_read(old, monkeypatch):
    monkeypatch.chdir(old)
    experiment = build(migrate(old_meta(old))["config"])
    abstract = jax.eval_shape(lambda: experiment.functions.init(0))
    with Checkpoints(old / "run/checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(6, abstract).state
    assert (int(state.step), int(state.opt_state.count), int(state.bad_step)) == (6, 6, -1)
    moments = jax.tree.leaves((state.opt_state.first, state.streams))
    assert sum(np.any(leaf) for leaf in moments) > 0.8 * len(moments)


@pytest.mark.breadth
def test_resumes_with_the_same_numbers(old, monkeypatch):
    monkeypatch.chdir(old)
    values = migrate(old_meta(old))["config"]
    values = {**values, "train": {**values["train"], "steps": 8}}
    ended = train(build(values), old / "run")
    records = [json.loads(line) for line in (old / "run" / METRICS_FILE).read_text().splitlines()]
    by_kind = {record["kind"]: record for record in records if record["step"] == 8}
    assert ended.step == 8
    assert {name: by_kind["train"][name] for name in TRAINED} == pytest.approx(TRAINED, rel=1e-4)
    assert {name: by_kind["evaluation"][name] for name in VALIDATED} == pytest.approx(VALIDATED, rel=1e-4)
    assert all("bits" not in record for record in records)
    with Checkpoints(old / "run/checkpoints", best_metric="bits_per_byte", higher_is_better=False) as checkpoints:
        assert checkpoints.best_step() == 8
        assert checkpoints.read_meta(8)["format_version"] == CHECKPOINT_FORMAT


def test_the_best_step_is_chosen_across_formats(old):
    with Checkpoints(old / "run/checkpoints", best_metric="bits_per_byte", read_only=True) as checkpoints:
        assert checkpoints.best_step() == 6


def test_every_renamed_field_has_its_new_name(old):
    meta = old_meta(old)
    meta["config"] |= {"mesh": "fsdp=2,tensor=4", "hyper": {"condition": "price", "at": None}}
    meta["config"]["task"]["deviation"] = 0.5
    meta["config"]["model"]["blocks_per_trip"] = 2
    before = json.dumps(meta)
    config = migrate(meta)["config"]
    assert config["mesh"] == "fsdp=2,fsdp_hidden=4"
    assert config["hypernetwork"] == {"condition": "penalty", "at": None}
    assert config["task"]["std"] == 0.5
    assert config["task"]["carry_state"] is True
    assert config["model"]["blocks_per_iteration"] == 2
    assert config["train"]["activation_penalty"] == 0.01
    old_names = {"hyper", "deviation", "carry", "blocks_per_trip", "activation_price", "tensorboard"}
    names = {name for group in (config, *config.values()) if isinstance(group, dict) for name in group}
    assert not names & old_names
    assert config["train"]["trackers"] == []
    assert json.dumps(meta) == before


def test_one_switch_is_for_all_trackers():
    meta = {"format": "seqboat", "format_version": 2, "config": {"train": {"steps": 3, "tensorboard": True}}}
    assert migrate(meta)["config"]["train"] == {"steps": 3, "trackers": ["tensorboard"]}
