"""What is asked of every script of launch/."""

import os
import shutil
import subprocess

import pytest
from fakes import ROOT

SCRIPTS = [
    "launch/accelerator.sh",
    "launch/tpu_pod.sh",
    "launch/tpu_worker.sh",
    "launch/local_procs.sh",
    "launch/slurm.sbatch",
    "launch/gke/entrypoint.sh",
]


def test_these_are_all():
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")}
    assert found == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_an_executable_bash_script_that_stops_at_errors(script):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(ROOT / script, os.X_OK)
    checked = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    "script", ["launch/accelerator.sh", "launch/tpu_pod.sh", "launch/local_procs.sh", "launch/slurm.sbatch"]
)
def test_help(machine, script):
    status, output = machine.run(script, "--help")
    assert status == 0
    assert output.startswith("usage: ")
    assert script in output


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
