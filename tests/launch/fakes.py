"""Fakes of the tools that the launch scripts call, first on PATH: each records its arguments, and does a little.

A fake appends "count NUL argument NUL ..." to a file of its own name, so that any argument is read back as it was.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Arguments that a shell would change if it ever parsed them.
HOSTILE = [
    "--config.name=two words",
    '--config.note=it\'s "quoted" $HOME `id` $(id) \\ \\n !! * ~ {a,b} ; rm & | < > #',
    "--config.lines=first\nsecond\n",
    "--config.empty=",
    "",
    "-",
    "--dashes",
    "\t tab and ünïcödé",
    "'",
    "$'\\x41'",
    "a --workdir=b",
]

# One write a record: bash's printf writes at every newline of an argument, so processes that start at once would mix.
APPEND = """#!/usr/bin/env bash
set -eu
record() {
  printf '%s\\0' "$(($# - 1))" "${@:2}" >"$FAKES/record.$$"
  cat "$FAKES/record.$$" >>"$FAKES/$1.calls"
  rm "$FAKES/record.$$"
}
"""

RECORD = APPEND + 'record "${0##*/}" "$@"\n'

# behaviour: what the training does, a piece of shell. `-c` is the real interpreter: local_procs.sh asks it for a port.
PYTHON = (
    APPEND
    + f"""
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
record python "$@"
record environment "${{JAX_PLATFORMS-}}" "${{XLA_FLAGS-}}"
id=0
for argument; do case $argument in --process_id=*) id=${{argument#*=}} ;; esac; done
source "$FAKES/behaviour"
"""
)

# On a worker: `-m uv venv` makes a folder whose interpreter is the fake one.
PYTHON3 = (
    RECORD
    + """
if [[ "$1 $2 ${3-}" == "-m uv venv" ]]; then
  mkdir -p "${@: -1}/bin"
  ln -s "$(command -v python)" "${@: -1}/bin/python"
fi
"""
)

# A pod of two workers, whose homes are worker0 and worker1. A describe answers with the next line of a file.
GCLOUD = (
    RECORD
    + """
answer() {
  head -n 1 "$FAKES/$1"
  if (($(wc -l <"$FAKES/$1") > 1)); then sed 1d "$FAKES/$1" >"$FAKES/next" && mv "$FAKES/next" "$FAKES/$1"; fi
}
worker=0
for argument; do
  case $argument in
    --worker=*) worker=${argument#*=} ;;
    --command=*) remote=${argument#*=} ;;
  esac
done
[[ $worker == all ]] && workers="0 1" || workers=$worker
case "$3 $4" in
  "queued-resources create") rm -rf "$FAKES"/worker? && mkdir "$FAKES"/worker{0,1} ;;
  "queued-resources describe") answer requests ;;
  "tpu-vm describe") answer pods ;;
  "tpu-vm scp") for i in $workers; do cp "$5" "$FAKES/worker$i/${6#*:}"; done ;;
  "tpu-vm ssh")
    for i in $workers; do (cd "$FAKES/worker$i" && HOME=$PWD exec sh -c "$remote") || exit; done ;;
esac
"""
)

SRUN = RECORD + 'echo $$ >"$FAKES/srun.pid"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
# As SLURM's own: the signal goes to the tasks.
SCANCEL = RECORD + 'kill -TERM "$(cat "$FAKES/srun.pid")"\n'
TAIL = RECORD + "cat seqboat/train.log\n"

SAVES = "trap 'echo saved; exit 0' TERM; echo ready; : >\"$FAKES/ready.$id\"; while :; do sleep 0.05; done"


def make_clone(folder: Path) -> Path:
    """A repository with launch/ as it is now, committed or not, and little else."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "experiments").mkdir()
    for program in ("train.py", "benchmark.py"):
        (folder / "experiments" / program).touch()
    identity = ["-c", "user.name=test", "-c", "user.email=test", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message=all"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


class Machine:
    """A folder of fakes, and how to start a script of a clone among them."""

    def __init__(self, folder: Path, clone: Path):
        self.folder, self.clone = folder, clone
        (folder / "bin").mkdir(parents=True)
        scripts = {"python": PYTHON, "python3": PYTHON3, "gcloud": GCLOUD, "srun": SRUN, "scancel": SCANCEL}
        for name, text in {**scripts, "scontrol": RECORD, "tail": TAIL}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "FAKES": str(folder),
            "POLL_SECONDS": "0",
            "GRACE_SECONDS": "10",
            "LC_ALL": "C.UTF-8",
            "ROOT": str(ROOT),
            "REAL": sys.executable,
        }
        self.behave("exit 0")
        self.answers(pods=["READY"], requests=["ACTIVE"])

    def behave(self, shell: str) -> None:
        """What the training does when it starts."""
        (self.folder / "behaviour").write_text(shell + "\n")

    def answers(self, **states: list[str]) -> None:
        """What gcloud says of the pod and of its request, one after the other; the last for ever."""
        for name, lines in states.items():
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    @contextmanager
    def start(self, *command: str, **environment: str) -> Iterator[subprocess.Popen]:
        """A script among the fakes, in a process group of its own; its standard output and error in one."""
        with subprocess.Popen(
            command,
            cwd=self.clone,
            env={**self.environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:  # a failed test leaves it
                    os.killpg(process.pid, signal.SIGKILL)

    def run(self, *command: str, answer: str = "", **environment: str) -> tuple[int, str]:
        """Its exit status and what it said."""
        with self.start(*command, **environment) as process:
            output, _ = process.communicate(answer, timeout=30)
        return process.returncode, output

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of every call of a program so far."""
        path = self.folder / f"{program}.calls"
        words = path.read_bytes().decode().split("\0")[:-1] if path.exists() else []
        calls = []
        while words:
            count = int(words[0])
            calls.append(words[1 : 1 + count])
            words = words[1 + count :]
        return calls

    def wait(self, program: str, count: int) -> list[list[str]]:
        """Its calls, once there are N."""
        for _ in range(400):
            if len(calls := self.calls(program)) >= count:
                return calls
            time.sleep(0.025)
        raise AssertionError(f"{program} was called {len(calls)} times, not {count}")
