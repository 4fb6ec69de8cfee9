"""Text of the Long Range Arena (Tay et al. 2021): the sentiment of an IMDB review (Maas et al. 2011), read as bytes.

IMDB has no validation split, and published results of this task select on the test split. Here validation is held out
from train, and test is used only for testing.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.data.sources import Source, Subset, open_split
from experiments.tasks.base import ClassificationConfig, ClassificationTask
from experiments.tasks.features import BYTE_VOCABULARY, byte_ids

DATASET, FEATURES = "imdb_reviews/plain_text", ("text", "label")


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """`length` is in bytes of the padded input; longer reviews are cut (3 % of them at LRA's 4000).

    `validation_fraction` of each class of train is held out, chosen by `validation_seed` rather than the run's seed.
    """

    vocabulary_size = BYTE_VOCABULARY
    classes = 2
    length: int = 4000
    validation_fraction: float = 0.1
    validation_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction}: must be between 0 and 1")
        if not 0 <= self.validation_seed < 2**64:
            raise ValueError(f"validation_seed={self.validation_seed}: must be in 0..{2**64 - 1}")


class Task(ClassificationTask):
    sized_by = ("validation_fraction",)

    def __init__(self, config: Config, *, data_dir: str | None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        labelled = open_split(DATASET, "train", data_dir, FEATURES)
        train, validation = split_by_content(labelled, config.validation_fraction, config.validation_seed)
        sources: dict[str, Source] = {
            "train": Subset(labelled, train),
            "validation": Subset(labelled, validation),
            "test": open_split(DATASET, "test", data_dir, FEATURES),
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: dict[str, Any]) -> np.ndarray:
        return byte_ids(example["text"])


def split_by_content(
    source: Source, fraction: float, seed: int
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Indices of train and validation, ascending: of each class, the `fraction` of texts with the lowest keyed hash.

    The choice depends only on the texts and the seed, not on their order or files. Copies of a text (IMDB's train has
    96) stay on one side, except for a tie exactly at the boundary.
    """
    key = seed.to_bytes(8, "little")
    examples = [source[index] for index in range(len(source))]
    digests = [hashlib.blake2b(example["text"], digest_size=8, key=key).digest() for example in examples]
    labels = np.array([example["label"] for example in examples])
    validation: list[int] = []
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda index: digests[index])
        validation += members[: round(fraction * len(members))]
    held_out = np.isin(np.arange(len(labels)), validation)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
