"""Induction with one trigger among 256 tokens, then streams of a million: what followed the trigger? Chance is 1 in 16.

    python -m experiments.train --config=configs/synthetic/induction.py:credit_router --workdir=runs/induction
    python -m examples.extrapolate --workdir=runs/induction

Two tokens of a sequence matter. A window of 8 active tokens reaches over any distance if no more than 8 are active.
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    del config.task["symbols"]
    config.task.update(name="induction", length=256, alphabet=16)
    config.model.position = "none"
    config.model.window_size = 8
    config.train.update(steps=3000, evaluate_every=1000, checkpoint_every=1000)
    apply_variant(config, variant, tiny=lambda config: None)
    return config
