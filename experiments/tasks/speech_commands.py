"""Speech Commands v0.02 (Warden 2018, arXiv 1804.03209): which word, from the raw samples at 16 kHz.

Reads what `python -m experiments.prepare --dataset=speech_commands/sc10` (or sc35) writes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.data.sources import open_split
from experiments.tasks.base import ClassificationConfig, ClassificationTask
from experiments.tasks.features import Standard


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """`words` is 10 or 35. Inputs are (sample - mean) / std, with the statistics of all samples of the training split.

    The published code computes mean and std per position in time instead.
    """

    vocabulary_size = None
    channels = 1
    words: int = 10
    length: int = 16_000

    def __post_init__(self):
        super().__post_init__()
        if self.words not in (10, 35):
            raise ValueError(f"words={self.words}: must be 10 or 35")

    @property
    def classes(self) -> int:
        return self.words


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        name = f"speech_commands/sc{config.words}"
        sources = {split: open_split(name, split, data_dir, ("audio", "label")) for split in ("train", *self.splits)}
        self._standard = Standard.of(sources["train"], "audio")
        super().__init__(config, sources, **batching)

    def encode(self, example: dict[str, Any]) -> np.ndarray:
        return self._standard(example["audio"])
