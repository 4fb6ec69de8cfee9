"""Metrics files that survive kills, and a console that suits where it prints."""

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments.common.errors import UserError
from experiments.training.metrics import METRICS_FILE, WALL_CLOCK_FIELDS, MetricsFile, Reporter

VALUES = {
    "loss": 0.69314,
    "accuracy": 0.5,
    "elements_per_second": 123456.7,
    "activation_rate": [0.43, 0.12],
    "gradient_norm": 2.0,
}


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / METRICS_FILE)


def reporter(workdir: Path, **options: Any) -> Reporter:
    defaults: dict = {"total_steps": 100, "start_step": 0, "process_index": 0}
    return Reporter(workdir, **{**defaults, **options})


# The metrics file


def test_lines_are_json(metrics: MetricsFile) -> None:
    metrics.append({"step": 1, "kind": "train", "loss": jnp.float32(0.5), "activation_rate": jnp.array([0.25, 1.0])})
    metrics.append({"step": np.int64(2), "kind": "train", "loss": float("nan"), "rates": [1.0, float("inf")], "n": 3})
    first, second = metrics.path.read_text().splitlines()
    assert first == '{"step": 1, "kind": "train", "loss": 0.5, "activation_rate": [0.25, 1.0]}'
    assert second == '{"step": 2, "kind": "train", "loss": null, "rates": [1.0, null], "n": 3}'
    assert [record["step"] for record in metrics.records()] == [1, 2]


def test_every_line_is_one_write(metrics: MetricsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            writes.append(bytes(data))
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Raw(self, mode))
    metrics.append({"step": 1, "kind": "train", "text": "x" * 100_000})
    assert len(writes) == 1
    assert writes[0].endswith(b'"}\n')


def test_values_round_trip_exactly(metrics: MetricsFile) -> None:
    value = np.float32(0.1)
    metrics.append({"step": 0, "kind": "train", "loss": value})
    metrics.truncate_after(0)
    (record,) = metrics.records()
    assert np.float32(record["loss"]) == value
    assert record["loss"] == float(value)


def test_cut_back_with_a_torn_last_line(metrics: MetricsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    for step in (10, 20, 20, 30):
        metrics.append({"step": step, "kind": "train"})
    kept = "".join(metrics.path.read_text().splitlines(keepends=True)[:3])
    with metrics.path.open("a") as file:
        file.write('{"step": 15, "ki')
    metrics.truncate_after(20)
    assert metrics.path.read_text() == kept
    assert warnings == [f"{metrics.path}: line 5 is truncated or not a record; skipped"]
    assert os.listdir(metrics.path.parent) == [METRICS_FILE]


@pytest.mark.parametrize("tail", ["[1]\n", "3\n", '{"kind": "train"}\n', '{"step": "4"}\n', '{"step": 5}', "\0\n"])
def test_foreign_lines_are_left_out(metrics: MetricsFile, tail: str) -> None:
    metrics.append({"step": 1, "kind": "train"})
    with metrics.path.open("a") as file:
        file.write(tail)
    metrics.truncate_after(9)
    assert metrics.path.read_text() == '{"step": 1, "kind": "train"}\n'


def test_cutting_fails_without_harm(metrics: MetricsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    metrics.append({"step": 1, "kind": "train"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        metrics.truncate_after(0)
    assert [record["step"] for record in metrics.records()] == [1]


def test_no_file(metrics: MetricsFile) -> None:
    metrics.truncate_after(3)
    assert list(metrics.records()) == []
    with pytest.raises(UserError, match=r"could not write to .*: No such file"):
        MetricsFile(metrics.path / "below" / "x").append({"step": 1})


def test_a_full_disk_is_reported(metrics: MetricsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:3])

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Full(self, mode))
    with pytest.raises(UserError, match="the disk is full"):
        metrics.append({"step": 1})


# The reporter


def test_records(tmp_path: Path) -> None:
    with reporter(tmp_path / "new/run") as run:
        run.train(10, VALUES)
        run.evaluation(10, "validation", {"loss": 0.7, "accuracy": float("nan")})
        run.message("not recorded")
    train, evaluation = MetricsFile(tmp_path / "new/run" / METRICS_FILE).records()
    assert train == {"step": 10, "kind": "train", **VALUES}
    assert evaluation == {"step": 10, "kind": "evaluation", "split": "validation", "loss": 0.7, "accuracy": None}
    assert set(WALL_CLOCK_FIELDS) & set(train) == {"elements_per_second"}


def test_resumed_records_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    for workdir, starts in (("whole", [(0, 40)]), ("resumed", [(0, 30), (20, 40)])):
        for start, stop in starts:
            with reporter(tmp_path / workdir, start_step=start) as run:
                for step in range(start + 10, stop + 10, 10):
                    run.train(step, {"loss": 1 / step})
    whole, resumed = ((tmp_path / name / METRICS_FILE).read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


def test_a_run_from_the_beginning_starts_afresh(tmp_path: Path) -> None:
    for _ in range(2):
        with reporter(tmp_path) as run:
            run.evaluation(0, "validation", {"loss": 1.0})
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 1


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with reporter(tmp_path) as run:
        run.message("seqboat [bold]0.1[/bold] " + "x" * 200)
        run.train(10, VALUES)
        run.progress(11)
        run.train(20, {"loss": float("nan")})
        run.evaluation(20, "test", {"loss": 0.5, "activation_rate": jnp.array([0.5, 0.25])})
    captured = capsys.readouterr()
    message, first, second, evaluation = captured.out.splitlines()
    assert message == "seqboat [bold]0.1[/bold] " + "x" * 200
    assert first == "step 10/100  loss 0.6931  accuracy 0.5  elements/s 123,457  act 0.43 0.12"
    assert second == "step 20/100  loss nan  eta 0:00:00"
    assert evaluation == "step 20/100  test  loss 0.5  act 0.50 0.25"
    assert captured.err == ""
    assert all(character.isprintable() for character in captured.out.replace("\n", ""))


def test_rates_of_several_modules_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with reporter(tmp_path) as run:
        run.train(10, {"activation_rate": [[0.5, 0.25], [0.75, 1.0]]})
    assert capsys.readouterr().out == "step 10/100  act 0.50 0.25 0.75 1.00\n"


def test_time_left(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with reporter(tmp_path) as run:
        for step, now in ((10, 100.0), (20, 110.0), (60, 150.0)):
            monkeypatch.setattr("time.monotonic", lambda now=now: now)
            run.train(step, {"loss": 1.0})
    assert [line.partition("eta ")[2] for line in capsys.readouterr().out.splitlines()] == ["", "0:01:20", "0:00:40"]


def test_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150, color_system=None)
    with reporter(tmp_path, console=console, start_step=5) as run:
        run.progress(9)
        run.train(10, VALUES)
        run.message("a [message]")
        run.evaluation(10, "validation", {"loss": 0.25})
        run.progress(11)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in output
    assert " 11/100" in output
    assert "loss 0.6931  accuracy 0.5  elements/s 123,457  act 0.43 0.12" in output
    assert "a [message]\n" in output
    assert "step 10/100  validation  loss 0.25\n" in output
    run.progress(12)  # closed: nothing to move


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with reporter(tmp_path / "run", process_index=1, trackers=("tensorboard",)) as run:
        run.train(1, VALUES)
        run.evaluation(1, "test", VALUES)
        run.message("hello")
        run.progress(2)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_workdir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*run: File exists"):
        reporter(tmp_path / "run")


def read_events(path: Path) -> list[Event]:
    """Event files are length (8 bytes), checksum (4), event, checksum (4), repeated."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard(tmp_path: Path) -> None:
    with reporter(tmp_path, trackers=("tensorboard",)) as run:
        run.train(10, VALUES)
        run.evaluation(10, "validation", {"loss": 0.25, "activation_rate": [1.0]})
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars = {v.tag: (e.step, v.simple_value) for e in read_events(path) for v in e.summary.value}
    assert scalars == {
        "loss": (10, pytest.approx(0.69314)),
        "accuracy": (10, 0.5),
        "elements_per_second": (10, pytest.approx(123456.7)),
        "activation_rate/layer_0": (10, pytest.approx(0.43)),
        "activation_rate/layer_1": (10, pytest.approx(0.12)),
        "gradient_norm": (10, 2.0),
        "validation/loss": (10, 0.25),
        "validation/activation_rate/layer_0": (10, 1.0),
    }


@pytest.mark.parametrize(("start_step", "purged_from"), [(20, 21), (0, 0)])
def test_tensorboard_forgets_what_is_done_again(tmp_path: Path, start_step: int, purged_from: int) -> None:
    with reporter(tmp_path, trackers=("tensorboard",), start_step=start_step) as run:
        run.train(30, {"loss": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    starts = [e.step for e in read_events(path) if e.session_log.status == SessionLog.START]
    assert starts == [purged_from]


def test_values_are_parsed_as_strict_json(tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    with reporter(tmp_path) as run:
        run.train(1, {"loss": float("-inf"), "activation_rate": [float("nan")]})
    record = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert record["loss"] is None
    assert record["activation_rate"] == [None]
