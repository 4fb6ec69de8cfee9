"""One process writes in a directory: a second is told which, and the end of the first frees it, however it ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from absl import logging

from experiments.common.errors import UserError
from experiments.training import claims
from experiments.training.claims import Claim

HOLDS = """
import sys, time
from pathlib import Path
from experiments.training.claims import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.mark.breadth  # test_checkpoints.py: test_killed_while_saving; test_loop.py: test_a_second_run_disturbs_nothing
def test_a_killed_process_frees_its_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            Claim(tmp_path)
        start = f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()} since 20"
        assert str(caught.value).startswith(start)
        process.kill()
    with Claim(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_one_directory_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with Claim(tmp_path / "a"), pytest.raises(UserError, match="in use"):
        Claim(tmp_path / "b")
    Claim(tmp_path / "b").release()


@pytest.mark.parametrize("content", ["", "[1]", "{}", "[" * 5000, '{"host": "\\u001b[2J", "pid": 1, "since": "x"}'])
def test_a_holder_that_does_not_say_who_it_is(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PATIENCE", 0.0)
    with Claim(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(UserError, match=r"is in use by (another process|process 1 on \?\[2J since x): wait"):
            Claim(tmp_path)


def test_a_holder_on_another_machine_may_be_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Claim(tmp_path)
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "x"}))
    slept = []
    monkeypatch.setattr(claims.time, "sleep", lambda _: slept.append(first.release()))
    Claim(tmp_path).release()
    assert len(slept) == 1


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("content")
    (tmp_path / ".lock").symlink_to("other")
    with pytest.raises(UserError, match=r"^cannot write in .*: .* \(\.lock\)$"):
        Claim(tmp_path)
    assert (tmp_path / "other").read_text() == "content"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(claims.errno.ENOSYS, "Function not implemented")

    lines: list[str] = []
    monkeypatch.setattr(claims.fcntl, "flock", none)
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    Claim(tmp_path).release()
    assert len(lines) == 1
    assert "do not start a second run in it" in lines[0]


def test_a_claim_makes_its_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with claims.owned(tmp_path / "a/b"), pytest.raises(UserError, match="in use"):
        claims.owned(tmp_path / "a/b")
    with pytest.raises(UserError, match=r"cannot write in .*file/x: Not a directory"):
        claims.owned(tmp_path / "file/x")
