"""launch/slurm.sbatch with fakes of srun, scancel and scontrol."""

import signal

import pytest
from fakes import HOSTILE, ROOT, SAVES

SCRIPT = "launch/slurm.sbatch"
JOB = {"SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": ".", "SLURM_CPUS_PER_TASK": "6"}
ARGUMENTS = ["--config=configs/quickstart.py", "--workdir=runs/x"]


def signalled(machine, number, behaviour):
    """The exit status and output of a job whose shell gets a signal while it trains."""
    machine.behave(behaviour)
    with machine.start(SCRIPT, *ARGUMENTS, **JOB) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    return process.returncode, output


def test_a_run_that_is_done_is_not_queued_again(machine):
    status, output = machine.run(SCRIPT, *ARGUMENTS, *HOSTILE, **JOB)
    assert status == 0, output
    train = ["python", "-m", "experiments.train", *ARGUMENTS, *HOSTILE]
    assert machine.calls("srun") == [["--kill-on-bad-exit=1", "--cpus-per-task=6", *train]]
    assert machine.calls("python") == [train[1:]]
    assert machine.calls("scancel") == machine.calls("scontrol") == []


def test_before_its_time_is_up_it_saves_and_is_queued_again(machine):
    status, output = signalled(machine, signal.SIGUSR1, SAVES)
    assert status == 0
    assert output.startswith("saved\n")
    assert machine.calls("scancel") == [["--signal=TERM", "42"]]
    assert machine.calls("scontrol") == [["requeue", "42"]]


def test_a_save_that_was_killed_is_queued_again(machine):
    """srun's status is then above 128; the checkpoint before it is there."""
    status, _ = signalled(machine, signal.SIGUSR1, SAVES.replace("echo saved; exit 0", "exit 137"))
    assert status == 137
    assert machine.calls("scontrol") == [["requeue", "42"]]


def test_an_error_while_saving_is_not_queued_again(machine):
    status, _ = signalled(machine, signal.SIGUSR1, SAVES.replace("echo saved; exit 0", "exit 2"))
    assert status == 2
    assert machine.calls("scontrol") == []


def test_a_cancelled_job_saves_and_stays_cancelled(machine):
    status, output = signalled(machine, signal.SIGTERM, SAVES)
    assert (status, output) == (0, "saved\n")
    assert machine.calls("scancel") == [["--signal=TERM", "42"]]
    assert machine.calls("scontrol") == []


@pytest.mark.parametrize("status", [1, 2, 139])
def test_a_failure_is_the_jobs_and_is_not_queued_again(machine, status):
    machine.behave(f"exit {status}")
    assert machine.run(SCRIPT, *ARGUMENTS, **JOB)[0] == status
    assert machine.calls("scontrol") == []


def test_what_sbatch_is_told():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=B:USR1@300", "--open-mode=append"} <= set(options)
    assert not any("gpus-per-task" in option for option in options)
    values = dict(option.split("=", 1) for option in options if "=" in option)
    assert values["--ntasks-per-node"] == values["--gpus-per-node"]
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (ARGUMENTS, {}, "sbatch launch/slurm.sbatch"),
        (["--config=x"], JOB, "--workdir=DIR is missing"),
        (ARGUMENTS, JOB | {"SLURM_SUBMIT_DIR": "/"}, "submit it from the root of the clone"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(machine, arguments, environment, message):
    status, output = machine.run(SCRIPT, *arguments, **environment)
    assert status == 2
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
    assert machine.calls("srun") == []
