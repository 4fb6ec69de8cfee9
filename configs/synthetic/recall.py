"""Associative recall: 8 pairs of key and value among 48 positions, then the 8 keys again. Chance is 1 in 16.

python -m experiments.train --config=configs/synthetic/recall.py --workdir=runs/recall
"""

from configs.synthetic import selective_copy


def get_config(variant: str = "paper"):
    config = selective_copy.get_config(variant)
    for field in ("symbols", "alphabet"):
        del config.task[field]
    config.task.update(name="recall", length=48, pairs=8, keys=16, values=16)
    return config
