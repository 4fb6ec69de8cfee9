"""Retrieval of the Long Range Arena (Tay et al. 2021): does one paper of AAN (Radev et al. 2013) cite the other?

Reads what `python -m experiments.prepare --dataset=aan` writes: both documents as bytes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.data.sources import open_split
from experiments.tasks.base import ClassificationConfig, ClassificationTask
from experiments.tasks.features import BYTE_VOCABULARY, byte_ids, pad

FEATURES = ("text1", "text2", "label")


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """`length` is in bytes of each padded document; longer ones are cut."""

    vocabulary_size = BYTE_VOCABULARY
    classes = 2
    length: int = 4000


class Task(ClassificationTask):
    """Batches hold pairs: `inputs` (B, L, 2) and `lengths` (B, 2)."""

    def __init__(self, config: Config, *, data_dir: str | None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        sources = {split: open_split("aan", split, data_dir, FEATURES) for split in ("train", *self.splits)}
        super().__init__(config, sources, **batching)

    def row(self, example: dict[str, Any]) -> dict[str, Any]:
        documents = [pad(byte_ids(example[name]), self.config.length) for name in ("text1", "text2")]
        inputs, lengths = zip(*documents, strict=True)
        return {"inputs": np.stack(inputs, -1), "lengths": np.array(lengths), "targets": self.target(example)}
