"""A context autoencoder of the bytes of reviews, then classifiers from 500 labels (`pretraining.py`).

TFDS_DATA_DIR=DIR python -m experiments.study --study=pretraining_text
"""

from collections.abc import Callable
from typing import Any

from experiments.studies import pretraining

FOLDER, ROWS = "probes", True
ARMS = ("raw_inputs", "random_encoder", "from_scratch", "cae", "cae_fine_tuned")


def study(save: Callable[[dict[str, Any]], None], *, seeds: range = range(5)) -> None:
    pretraining.compare("text", ARMS, save, seeds=seeds)
