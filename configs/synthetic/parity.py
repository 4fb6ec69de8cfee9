"""Parity of the bits so far, trained on 40 bits, tested on 256: a negative control. Chance is 1 in 2.

python -m experiments.train --config=configs/synthetic/parity.py:credit_router --workdir=runs/parity
python -m experiments.evaluate --workdir=runs/parity
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    for field in ("symbols", "alphabet"):
        del config.task[field]
    config.task.update(name="parity", length=40, test_length=256)
    config.model.position = "none"
    apply_variant(config, variant, tiny=lambda config: None)
    return config
