"""Digits of 8 x 8 pixels, row by row, classified by their distances to learned prototypes (docs/prototypes.md).

    python -m experiments.train --config=configs/interp/prototypes.py --workdir=runs/prototypes
    python -m experiments.report --workdir=runs/prototypes

Any classifier takes the head: config.model.head = base.head("prototypes") in its config.
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.update(name="digits", length=8)
    config.model.update(layers=1, features=32, key_size=16, value_size=64, window_size=8, max_positions=8)
    config.model.update(block_size=32, head=base.head("prototypes"))
    config.optimizer.update(learning_rate=4e-3, warmup_steps=50)
    # Validated once, at the end: the accuracy is at its best long before the prototypes are at examples.
    config.train.update(steps=1500, batch_size=64, log_every=100, evaluate_every=1500, checkpoint_every=500)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    config.train.update(steps=200, evaluate_every=200, checkpoint_every=200)
