"""A context autoencoder of spoken digits, then classifiers from 100 labels (`pretraining.py`).

TFDS_DATA_DIR=DIR python -m experiments.study --study=pretraining_spoken_digit
"""

from collections.abc import Callable
from typing import Any

from experiments.studies import pretraining

FOLDER, ROWS = "probes", True
ARMS = ("raw_inputs", "random_encoder", "from_scratch", "cae", "cae_fine_tuned")


def study(save: Callable[[dict[str, Any]], None], *, seeds: range = range(5)) -> None:
    pretraining.compare("spoken_digit", ARMS, save, seeds=seeds)
