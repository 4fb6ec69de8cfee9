"""Spoken digits (Free Spoken Digit Dataset 1.0.9): which of ten, from the raw samples at 8 kHz.

For each digit and speaker, recordings 0 to 4 are for testing, as its authors specify, and 5 to 9 for validation.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.common.config import within
from experiments.common.errors import UserError
from experiments.data.sources import Subset, open_split
from experiments.tasks.base import MAX_SIZE, ClassificationConfig, ClassificationTask
from experiments.tasks.features import Standard

VALIDATION, TEST = range(5, 10), range(5)


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """`length` is in elements of the padded input, each of `frame` consecutive samples; 8000 samples, one second, cut
    four recordings. Inputs are (sample - mean) / std, with the statistics of all samples of the training split."""

    vocabulary_size = None
    classes = 10
    length: int = 8000
    frame: int = 1

    def __post_init__(self):
        super().__post_init__()
        within(self, 1, MAX_SIZE, "frame")

    @property
    def channels(self) -> int:
        return self.frame


class Task(ClassificationTask):
    def __init__(self, config: Config, *, data_dir: str | None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        recordings = open_split("spoken_digit", "train", data_dir, ("audio", "label", "audio/filename"))
        indices = np.array([_index(recordings[number]["audio/filename"]) for number in range(len(recordings))])
        test, validation = np.isin(indices, TEST), np.isin(indices, VALIDATION)
        parts = {"train": ~test & ~validation, "validation": validation, "test": test}
        sources = {split: Subset(recordings, np.flatnonzero(chosen)) for split, chosen in parts.items()}
        self._standard = Standard.of(sources["train"], "audio")
        super().__init__(config, sources, **batching)

    def encode(self, example: dict[str, Any]) -> np.ndarray:
        samples, frame = self._standard(example["audio"]), self.config.frame
        return samples[: len(samples) - len(samples) % frame].reshape(-1, frame)  # the rest is not a whole frame


def _index(filename: bytes | str) -> int:
    """The number of a recording called digit_speaker_number.wav."""
    name = filename.decode() if isinstance(filename, bytes) else filename
    found = re.fullmatch(r"\d_\w+_(\d+)\.wav", name)
    if not found:
        raise UserError(f"spoken_digit: {name!r} is not of the form digit_speaker_number.wav")
    return int(found[1])
