"""launch/local_procs.sh with a fake python."""

import os
import re
import signal
import time

import pytest
from fakes import HOSTILE, SAVES

SCRIPT = "launch/local_procs.sh"


def said(output):
    """The lines of every process, in its order."""
    lines: dict[str, list[str]] = {}
    for line in output.splitlines():
        if match := re.fullmatch(r"\[(\d+)\] (.*)", line):
            lines.setdefault(match[1], []).append(match[2])
    return lines


def test_starts_n_processes_that_know_one_another(machine):
    machine.behave('echo "one of $id"; printf "no newline"')
    status, output = machine.run(SCRIPT, "3", "4", *HOSTILE, XLA_FLAGS="--xla_a=1 --xla_b=2")
    assert status == 0
    assert said(output) == {str(i): [f"one of {i}", "no newline"] for i in range(3)}
    calls = sorted(machine.calls("python"), key=lambda call: call[-1])
    address = calls[0][-3]
    assert re.fullmatch(r"--coordinator_address=127\.0\.0\.1:\d+", address)
    for index, call in enumerate(calls):
        flags = [address, "--num_processes=3", f"--process_id={index}"]
        assert call == ["-m", "experiments.train", *HOSTILE, *flags]
    flags = "--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=4"
    assert machine.calls("environment") == [["cpu", flags]] * 3
    assert not list(machine.folder.glob("tmp.*")), "the pipes stayed"


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["alone", "group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_all_to_save_and_waits(machine, number, send):
    """A terminal's Ctrl-C reaches the whole group: the children, and what prints their lines."""
    machine.behave(SAVES)
    with machine.start(SCRIPT, "2", "1") as process:
        lines = [process.stdout.readline() for _ in range(2)]
        assert sorted(lines) == ["[0] ready\n", "[1] ready\n"]
        send(process.pid, number)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert [said(output)[index][-1] for index in ("0", "1")] == ["saved", "saved"]


def test_one_that_fails_ends_the_others_and_gives_its_status(machine):
    others = 'until [[ -e "$FAKES/ready.0" && -e "$FAKES/ready.2" ]]; do sleep 0.02; done'
    machine.behave(f"if [[ $id == 1 ]]; then {others}; echo broken; exit 7; fi; {SAVES}")
    status, output = machine.run(SCRIPT, "3", "1")
    assert status == 7
    assert said(output) == {"0": ["ready", "saved"], "1": ["broken"], "2": ["ready", "saved"]}
    assert "process 1 ended with status 7" in output


def test_one_that_does_not_end_is_killed_after_the_grace(machine):
    other = 'until [[ -e "$FAKES/ready.1" ]]; do sleep 0.02; done'
    machine.behave(f"if [[ $id == 0 ]]; then {other}; exit 3; fi; {SAVES.replace('exit 0', ':')}")
    began = time.monotonic()
    status, output = machine.run(SCRIPT, "2", "1", GRACE_SECONDS="1")
    assert status == 3
    assert time.monotonic() - began < 8
    assert said(output) == {"1": ["ready", "saved"]}, "it was asked before it was killed"


def test_a_second_signal_kills(machine):
    machine.behave("trap 'echo deaf' TERM; echo ready; while :; do sleep 0.05; done")
    with machine.start(SCRIPT, "1", "1") as process:
        assert process.stdout.readline() == "[0] ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "[0] deaf\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        ([], {}, "the first two arguments are numbers"),
        (["2", "--config=x"], {}, "the first two arguments are numbers"),
        (["0", "1"], {}, "the first two arguments are numbers"),
        (["2", "1"], {"GRACE_SECONDS": "soon"}, "GRACE_SECONDS is a number"),
        (["2", "1"], {"PYTHON": "no-such-python"}, "there is no no-such-python"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(machine, command, environment, message):
    status, output = machine.run(SCRIPT, *command, **environment)
    assert status == 2
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
    assert machine.calls("python") == []
