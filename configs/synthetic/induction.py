"""Induction with one trigger among 64 tokens, then streams of a million: what followed the trigger? Chance is 1 in 16.

    python -m experiments.train --config=configs/synthetic/induction.py:credit_router --workdir=runs/induction
    python -m examples.extrapolate --workdir=runs/induction

Two tokens of a sequence matter. A window of 8 active tokens reaches over any distance if few others are active; the
penalty sees to that, since 64 tokens alone hardly do.
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    del config.task["symbols"]
    config.task.update(name="induction", length=64, alphabet=16)
    config.model.position = "none"
    config.model.window_size = 8
    config.train.update(steps=2000, evaluate_every=1000, checkpoint_every=1000, activation_penalty=0.1)
    apply_variant(config, variant, tiny=lambda config: None)
    return config
