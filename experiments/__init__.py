"""Programs around the seqboat library: training, evaluation, data. A notebook starts at `experiments.load`."""

from pathlib import Path
from typing import Any


def load(source: str | Path, step: int | None = None, data_dir: str | None = None) -> Any:
    """Load the trained model of a work directory (`training.restore.Run`), by default its best step, or of an exported
    file, "model.safetensors". Raises UserError."""
    from experiments.training import restore  # imported late, so that `import experiments` stays cheap

    return restore.load(source, step, data_dir)
