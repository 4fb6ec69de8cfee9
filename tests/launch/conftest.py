"""A machine whose gcloud, SLURM and python are fakes."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import Machine, make_clone


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def machine(tmp_path: Path, clone: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "a machine's folder", clone)
    yield made
    for path in made.folder.glob("worker?/seqboat/train.pid"):
        with suppress(ValueError, OSError):
            process = int(path.read_text())
            if b"experiments.train" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)
