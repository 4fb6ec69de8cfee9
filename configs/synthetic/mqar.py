"""Multi-query associative recall: 4 pairs of key and value, then each key again among blanks. Chance is 1 in 64.

12 of the 64 positions matter, and a window of 12 slots holds them if the blanks stay inactive. The size of the state is
that of config.model.features, key_size, value_size and window_size. Harder: more pairs and positions, and
config.task.random_fillers, where keys can no longer be told from what lies between them.

    python -m experiments.train --config=configs/synthetic/mqar.py:credit_router --workdir=runs/mqar
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    for field in ("symbols", "alphabet"):
        del config.task[field]
    config.task.update(name="mqar", length=64, pairs=4, vocabulary=128, power=0.01, random_fillers=False)
    config.model.window_size = 12
    apply_variant(config, variant, tiny=lambda config: None)
    return config
