"""Associative recall: 8 pairs of key and value among 48 positions, then the 8 keys again. Chance is 1 in 16.

The window of 24 slots holds all pairs and the queries before the last one, 8 x 2 + 7, if the blanks stay inactive.

python -m experiments.train --config=configs/synthetic/recall.py --workdir=runs/recall
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    for field in ("symbols", "alphabet"):
        del config.task[field]
    config.task.update(name="recall", length=48, pairs=8, keys=16, values=16)
    config.model.window_size = 24
    apply_variant(config, variant, tiny=lambda config: None)
    return config
