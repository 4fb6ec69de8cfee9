"""launch/tpu_pod.sh with a fake gcloud, whose workers are folders in which the remote commands really run."""

import os
import shlex
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from fakes import HOSTILE, SAVES, Machine, make_clone

SCRIPT = "launch/tpu_pod.sh"
GOLDEN = Path(__file__).parent / "tpu_pod_dry_run.txt"
WHERE = ["--name=pod", "--zone=us-west4-a"]
KIND = ["--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
RUN = ["--workdir=/mnt/my runs/x"]
TRAIN = ["--", "--config=configs/quickstart.py", "--config.note=it's $HOME"]
DRY_RUNS = [
    ["create", *WHERE, "--project=mine", *KIND],
    ["push", *WHERE, "--setup=sudo mount -t nfs 10.0.0.2:/share /mnt"],
    ["run", *WHERE, *RUN, *TRAIN],
    ["run", *WHERE, *RUN, *KIND, "--retries=2", *TRAIN],
    ["status", *WHERE],
    ["logs", *WHERE, "--worker=1"],
    ["stop", *WHERE],
    ["delete", *WHERE],
]


def kinds(calls):
    """What gcloud was asked for, call by call."""
    return [f"{call[2]} {call[3]}" for call in calls]


def worker(machine, index, name):
    return machine.folder / f"worker{index}" / "seqboat" / name


def until(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError("it did not happen")


@pytest.fixture(scope="session")
def pushed(tmp_path_factory, clone):
    """The folder of a machine that made a pod and put the project on it. Not to be changed: copy it."""
    machine = Machine(tmp_path_factory.mktemp("pushed") / "machine", clone)
    assert machine.run(SCRIPT, "create", *WHERE, *KIND)[0] == 0
    status, output = machine.run(SCRIPT, "push", *WHERE)
    assert status == 0, output
    return machine.folder


@pytest.fixture
def pod(machine, pushed):
    """A pod with the project on it."""
    shutil.copytree(pushed, machine.folder, symlinks=True, dirs_exist_ok=True)
    return machine


def test_dry_run_prints_every_command_and_runs_none(machine):
    """To accept other commands on purpose: SEQBOAT_WRITE_GOLDEN=1 python -m pytest tests/launch."""
    said = ""
    for command in DRY_RUNS:
        status, output = machine.run(SCRIPT, *command, "--dry-run") if "--" not in command else dry(machine, command)
        assert status == 0, output
        said += f"$ launch/tpu_pod.sh {shlex.join(command)}\n{output.replace(str(machine.clone), 'CLONE')}\n"
    if os.environ.get("SEQBOAT_WRITE_GOLDEN"):
        GOLDEN.write_text(said)
    assert said == GOLDEN.read_text()
    assert machine.calls("gcloud") == []


def dry(machine, command):
    where = command.index("--")
    return machine.run(SCRIPT, *command[:where], "--dry-run", *command[where:])


@pytest.mark.parametrize(
    "command", [["create", *WHERE, *KIND], ["run", *WHERE, *RUN, "--", *HOSTILE], ["stop", *WHERE]]
)
def test_what_a_dry_run_prints_is_what_runs(pod, command):
    """Pasted into a shell, the printed commands call gcloud with the same arguments."""
    before = len(pod.calls("gcloud"))
    assert pod.run(SCRIPT, *command)[0] == 0
    really = pod.calls("gcloud")[before:]
    until(lambda: not worker(pod, 0, "train.pid").exists() or worker(pod, 0, "train.status").exists())
    until(lambda: not worker(pod, 1, "train.pid").exists() or worker(pod, 1, "train.status").exists())
    text = (dry(pod, command) if "--" in command else pod.run(SCRIPT, *command, "--dry-run"))[1]
    assert len(pod.calls("gcloud")) == before + len(really)
    pasted = subprocess.run(["bash", "-c", text], env=pod.environment, cwd=pod.folder, capture_output=True, text=True)
    assert pasted.returncode == 0, pasted.stderr
    assert pod.calls("gcloud")[before + len(really) :] == really


def test_create_waits_until_the_pod_is_there(machine):
    machine.answers(requests=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    status, output = machine.run(SCRIPT, "create", *WHERE, *KIND, "--project=mine")
    assert status == 0
    assert [line.split()[-1] for line in output.splitlines()] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    created, *described = machine.calls("gcloud")
    words = ["queued-resources", "create", "pod", "--node-id=pod", "--accelerator-type=v5litepod-16"]
    words += ["--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a", "--project=mine"]
    assert created == ["compute", "tpus", *words]
    assert kinds(described) == ["queued-resources describe"] * 3


def test_create_says_that_a_request_failed(machine):
    machine.answers(requests=["FAILED"])
    status, output = machine.run(SCRIPT, "create", *WHERE, *KIND)
    assert status == 1
    assert "error: no pod" in output


def test_push_installs_the_committed_files_on_all_workers(pod):
    for index in (0, 1):
        assert worker(pod, index, "code/pyproject.toml").read_bytes() == (pod.clone / "pyproject.toml").read_bytes()
        assert stat.S_IMODE(worker(pod, index, ".").stat().st_mode) == 0o700
        assert not (pod.folder / f"worker{index}" / "seqboat.tar.gz").exists()
    assert pod.calls("python3")[-1][-1] == "--editable=./code[tpu]"
    assert not list(pod.folder.glob("tmp.*")), "the archive stayed"


def test_push_says_what_it_leaves_out(pod, tmp_path):
    pod.clone = make_clone(tmp_path / "another")
    assert pod.run(SCRIPT, "push", *WHERE) == (0, "")
    (pod.clone / "pyproject.toml").write_text("changed\n")
    assert pod.run(SCRIPT, "push", *WHERE) == (0, "uncommitted changes are not pushed\n")
    assert "changed" not in worker(pod, 0, "code/pyproject.toml").read_text()


def test_push_replaces_the_files_and_runs_the_setup_last(pod):
    worker(pod, 1, "code/gone.py").write_text("removed since\n")
    setup = 'echo "it\'s $HOME" > mounted; test -d seqboat/code'
    assert pod.run(SCRIPT, "push", *WHERE, f"--setup={setup}")[0] == 0
    assert not worker(pod, 1, "code/gone.py").exists()
    assert (pod.folder / "worker1" / "mounted").read_text() == f"it's {pod.folder / 'worker1'}\n"


def test_arguments_arrive_as_they_were(pod):
    status, output = pod.run(SCRIPT, "run", *WHERE, *RUN, "--", *HOSTILE)
    assert status == 0, output
    assert pod.wait("python", 2) == [["-m", "experiments.train", "--workdir=/mnt/my runs/x", *HOSTILE]] * 2


def test_status_logs_and_stop(pod):
    pod.behave(SAVES)
    assert "not running" in pod.run(SCRIPT, "status", *WHERE)[1]
    assert pod.run(SCRIPT, "run", *WHERE, *RUN, *TRAIN)[0] == 0
    status, output = pod.run(SCRIPT, "status", *WHERE)
    assert (status, output.count(": running")) == (0, 2)
    assert output.startswith("pod: READY\n")
    until(lambda: all(worker(pod, index, "train.log").read_text() == "ready\n" for index in (0, 1)))
    again = pod.run(SCRIPT, "run", *WHERE, *RUN, *TRAIN)
    assert again[0] == 3
    assert "training is already running" in again[1]
    assert pod.run(SCRIPT, "push", *WHERE)[0] == 3
    assert pod.run(SCRIPT, "stop", *WHERE)[1].count(": exited 0") == 2
    assert pod.run(SCRIPT, "logs", *WHERE, "--worker=1") == (0, "ready\nsaved\n")
    assert pod.calls("tail") == [["-n", "100", "-F", "seqboat/train.log"]]
    assert pod.run(SCRIPT, "status", *WHERE)[1].count(": exited 0") == 2
    pod.answers(pods=["PREEMPTED"])
    assert pod.run(SCRIPT, "status", *WHERE) == (0, "pod: PREEMPTED\n")


def test_a_process_id_of_another_program_is_not_the_training(pod):
    with subprocess.Popen(["sleep", "30"]) as other:
        worker(pod, 0, "train.pid").write_text(f"{other.pid}\n")
        assert pod.run(SCRIPT, "stop", *WHERE)[1].count(": not running") == 2
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("answer", ["", "no\n", "pod2\n", "y\n"])
def test_delete_refuses_without_the_name(machine, answer):
    status, output = machine.run(SCRIPT, "delete", *WHERE, answer=answer)
    assert status == 1
    assert "error: not deleted" in output
    assert machine.calls("gcloud") == []


@pytest.mark.parametrize(("options", "answer"), [([], "pod\n"), (["--yes"], "")])
def test_delete(machine, options, answer):
    assert machine.run(SCRIPT, "delete", *WHERE, *options, answer=answer)[0] == 0
    deleted = ["compute", "tpus", "queued-resources", "delete", "pod", "--force", "--quiet", "--zone=us-west4-a"]
    assert machine.calls("gcloud") == [deleted]


def test_a_preempted_pod_is_made_again_and_resumes_in_the_same_work_directory(pod):
    """The first look finds the training ended, as a pod's processes are while it is taken away; nobody believes it."""
    pod.answers(pods=["READY", "PREEMPTED", "READY"], requests=["PROVISIONING", "ACTIVE"])
    before = len(pod.calls("gcloud"))
    status, output = pod.run(SCRIPT, "run", *WHERE, *RUN, *KIND, "--setup=touch mounted", "--retries=1", "--", *HOSTILE)
    assert status == 0, output
    assert "1 retries left" not in output
    assert "0 retries left" in output
    calls = [call for call in pod.calls("gcloud")[before:] if call[3] != "describe"]
    ssh, scp = "tpu-vm ssh", "tpu-vm scp"
    made = ["queued-resources delete", "queued-resources create", scp, ssh, ssh]
    assert kinds(calls)[:8] == [ssh, ssh, *made, ssh]
    assert set(kinds(calls)[8:]) == {ssh}
    assert calls[0] == calls[7], "the same command, with the same work directory"
    assert "--spot" in calls[3]
    assert (pod.folder / "worker0" / "mounted").exists()
    assert pod.wait("python", 4) == [["-m", "experiments.train", "--workdir=/mnt/my runs/x", *HOSTILE]] * 4


def test_preemptions_beyond_the_retries_end_the_watch(pod):
    pod.answers(pods=["PREEMPTED"])
    status, output = pod.run(SCRIPT, "run", *WHERE, *RUN, *KIND, "--retries=2", *TRAIN)
    assert status == 1
    assert "no retry is left" in output
    assert kinds(pod.calls("gcloud")).count("queued-resources create") == 3  # the fixture's, and two more


def test_a_restarted_worker_counts_as_preempted(pod):
    """Its files are there but nothing runs, and nothing said how it ended."""
    pod.behave("sleep 0.2; kill -KILL $PPID; exit 0")
    status, output = pod.run(SCRIPT, "run", *WHERE, *RUN, *KIND, "--retries=1", *TRAIN)
    assert status == 1
    assert "pod: lost" in output


def test_a_training_that_fails_is_not_tried_again(pod):
    pod.behave("exit 2")
    status, output = pod.run(SCRIPT, "run", *WHERE, *RUN, *KIND, "--retries=3", *TRAIN)
    assert status == 1
    assert "error: the training failed" in output
    assert "queued-resources delete" not in kinds(pod.calls("gcloud"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "no command"),
        (["--zone=z"], "unknown command --zone=z"),
        (["train"], "unknown command train"),
        (["push", "--zone=z"], "--name=NAME is missing"),
        (["push", "--name=-o", "--zone=z"], "not a pod name"),
        (["push", "--name=pod"], "--zone=ZONE is missing"),
        (["push", *WHERE, "--branch=x"], "unknown option --branch=x"),
        (["push", *WHERE, "--project", "mine"], "unknown option --project"),
        (["push", *WHERE, "--", "--config=x"], "only run takes"),
        (["create", *WHERE, "--type=x"], "--type=TYPE and --version=VERSION are missing"),
        (["run", *WHERE, "--", "--config=x"], "--workdir=/PATH must be"),
        (["run", *WHERE, "--workdir=gs://bucket/x", "--", "--config=x"], "--workdir=/PATH must be"),
        (["run", *WHERE, *RUN], "no training arguments"),
        (["run", *WHERE, *RUN, "--", "--config=x", "--workdir=/y"], "--workdir comes before"),
        (["run", *WHERE, *RUN, "--retries=2", "--", "--config=x"], "--type=TYPE and --version=VERSION are missing"),
        (["run", *WHERE, *RUN, "--retries=-1", "--", "--config=x"], "take a number"),
        (["logs", *WHERE, "--worker=0,1"], "take a number"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(machine, command, message):
    status, output = machine.run(SCRIPT, *command)
    assert status == 2
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
    assert machine.calls("gcloud") == []
