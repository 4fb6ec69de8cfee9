"""A machine whose gcloud, SLURM and python are fakes."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "a machine's folder")
    yield made
    for path in made.folder.glob("worker?/seqboat/train.pid"):
        with suppress(ValueError, ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)
