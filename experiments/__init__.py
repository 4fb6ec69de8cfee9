"""Programs around the seqboat library: training, evaluation, data. A notebook starts at `experiments.load`."""

from pathlib import Path
from typing import Any


def load(workdir: str | Path, step: int | None = None, data_dir: str | None = None) -> Any:
    """Load the trained model of a work directory (`training.restore.Run`), by default its best step. Raises
    UserError."""
    from experiments.training import restore  # imported late, so that `import experiments` stays cheap

    return restore.load(workdir, step, data_dir)
