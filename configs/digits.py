"""Handwritten digits of 8 x 8 pixels, pixel by pixel: real pictures, two or three minutes on two cores.

    python -m experiments.train --config=configs/digits.py:credit_router --workdir=runs/digits

The data are scikit-learn's (pip install scikit-learn).
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.update(name="digits", length=64)
    config.model.update(layers=2, features=64, key_size=32, value_size=128, window_size=16, max_positions=64)
    config.model.update(block_size=64, remat="none")
    config.optimizer.update(learning_rate=3e-3, warmup_steps=100)
    config.train.update(steps=800, batch_size=32, checkpoint_every=400)
    apply_variant(config, variant, tiny=lambda config: None)
    return config
