"""Several real processes over localhost: they train as one does, save when asked to stop, and end when one is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.training.checkpoints import Checkpoints
from experiments.training.metrics import METRICS_FILE
from tests.helpers import SMALL_MODEL

REPOSITORY = Path(__file__).parents[2]
SHORT_LISTOPS = {"task.train_examples": 200, "task.validation_examples": 40, "task.test_examples": 40}
CHANGES = {
    **SMALL_MODEL,
    "model.form": "packed",  # sequences are split over devices
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.evaluate_every": 100,
    "train.checkpoint_every": 100,
}


class Run:
    """`count` processes of `devices` CPU devices each, on one work directory."""

    def __init__(
        self,
        workdir: Path,
        processes: int,
        devices: int,
        mesh: str,
        config: str = "configs/quickstart.py",
        task: Mapping[str, Any] = SHORT_LISTOPS,
        **train: int,
    ):
        self.workdir = workdir
        changes = {**CHANGES, **task, **{f"train.{name}": value for name, value in train.items()}, "mesh": mesh}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in changes.items()]
        cache = os.path.expanduser("~/.cache/seqboat/tests")
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
        self.processes = []
        for process in range(processes):
            own = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={process}"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.processes.append(
                subprocess.Popen(command + own * (processes > 1), cwd=REPOSITORY, env=environment, **pipes)
            )

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit statuses, and in `outputs` what each said."""
        self.outputs = [process.communicate(timeout=seconds)[0] for process in self.processes]
        return [process.returncode for process in self.processes]

    def reach(self, step: int, seconds: float = 240) -> None:
        """Returns when that step has been reported."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(record["step"] >= step for record in self.records()):
                return
            assert all(process.poll() is None for process in self.processes), self.wait() and self.outputs
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached in {seconds} s")

    def records(self) -> list[dict]:
        path = self.workdir / METRICS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.records() if record["kind"] == "train"}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Four devices of two processes, half of every batch read by each, against four devices of one."""
    two = Run(tmp_path / "two", 2, 2, "data=2,sequence=2", steps=6)
    assert two.wait() == [0, 0], two.outputs
    assert "a mesh of 4 devices: data 2, sequence 2" in two.outputs[0]
    one = Run(tmp_path / "one", 1, 4, "data=2,sequence=2", steps=6)
    assert one.wait() == [0], one.outputs
    assert list(one.losses()) == [1, 2, 3, 4, 5, 6]
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)


@pytest.mark.slow
def test_two_processes_read_streams_as_one(tmp_path):
    """Each reads its rows of the text, which begin again in step 9, and keeps what the model remembers of them."""
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 105, 2000).astype(np.uint8).tobytes())
    task = {"task.files": f'("{text}",)', "task.length": 32, "task.context": 16, "task.carry_state": True}
    plan: Any = {"config": "configs/lm/bytes.py:credit_router,tiny", "task": task, "steps": 12, "evaluate_every": 4}
    two = Run(tmp_path / "two", 2, 2, "data=2,fsdp=2", **plan)
    assert two.wait() == [0, 0], two.outputs
    one = Run(tmp_path / "one", 1, 1, "data", **plan)
    assert one.wait() == [0], one.outputs
    assert len(one.losses()) == 12
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    validations = [[r["loss"] for r in run.records() if r["kind"] == "evaluation"] for run in (two, one)]
    assert validations[0] == pytest.approx(validations[1], rel=1e-5)
    assert len(validations[1]) == 3


@pytest.mark.slow
def test_asked_to_stop_they_save_and_another_topology_resumes(tmp_path):
    """SIGTERM to all of two processes; the run resumes in two, and from a copy in one process of four devices."""
    whole = Run(tmp_path / "whole", 2, 2, "fsdp", steps=40)
    assert whole.wait() == [0, 0], whole.outputs
    broken = Run(tmp_path / "broken", 2, 2, "fsdp", steps=40)
    broken.reach(5)
    for process in broken.processes:
        process.send_signal(signal.SIGTERM)
    assert broken.wait() == [0, 0], broken.outputs
    stopped = Checkpoints(tmp_path / "broken" / "checkpoints", read_only=True).steps()[-1]
    assert 5 <= stopped < 40
    assert f"asked to stop: saved step {stopped}" in broken.outputs[0]
    subprocess.run(["cp", "-r", tmp_path / "broken", tmp_path / "other"], check=True)
    again = Run(tmp_path / "broken", 2, 2, "fsdp", steps=40)
    assert again.wait() == [0, 0], again.outputs
    assert again.losses() == whole.losses()
    other = Run(tmp_path / "other", 1, 4, "data", steps=40)
    assert other.wait() == [0], other.outputs
    assert other.losses() == pytest.approx(whole.losses(), rel=1e-5)


@pytest.mark.slow
def test_four_processes_asked_to_stop_and_one_resumes(tmp_path):
    """SIGTERM to all of four processes of one device; one process of four devices resumes. The losses, before and
    after, are those of one process that was never stopped."""
    mesh = "data=2,sequence=2"
    broken = Run(tmp_path / "broken", 4, 1, mesh, steps=40)
    broken.reach(5)
    for process in broken.processes:
        process.send_signal(signal.SIGTERM)
    assert broken.wait() == [0] * 4, broken.outputs
    stopped = max(broken.losses())
    assert 5 <= stopped < 40
    assert f"asked to stop: saved step {stopped}" in broken.outputs[0]
    again = Run(tmp_path / "broken", 1, 4, mesh, steps=40)
    assert again.wait() == [0], again.outputs
    assert f"resuming from step {stopped}" in again.outputs[0]
    whole = Run(tmp_path / "whole", 1, 4, mesh, steps=40)
    assert whole.wait() == [0], whole.outputs
    assert list(whole.losses()) == list(range(1, 41))
    assert again.losses() == pytest.approx(whole.losses(), rel=1e-5)


@pytest.mark.slow
def test_when_one_is_killed_the_others_end_and_say_so(tmp_path):
    run = Run(tmp_path / "run", 2, 1, "data", steps=100_000, checkpoint_every=5)
    run.reach(12)
    run.processes[1].kill()
    began = time.monotonic()
    statuses = run.wait()
    assert time.monotonic() - began < 150
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] != 0
    assert "process" in run.outputs[0].lower() or "task" in run.outputs[0].lower()
    kept = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps()[-1]
    assert kept >= 10
