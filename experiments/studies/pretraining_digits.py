"""A context autoencoder of digits, then a linear probe of 50 labels (`pretraining.py`).

python -m experiments.study --study=pretraining_digits
"""

from collections.abc import Callable
from typing import Any

from experiments.studies import pretraining

FOLDER, ROWS = "probes", True
ARMS = ("random_encoder", "raw_inputs", "cae", "mae", "align_0")


def study(save: Callable[[dict[str, Any]], None], *, seeds: range = range(5)) -> None:
    pretraining.compare("digits", ARMS, save, seeds=seeds)
