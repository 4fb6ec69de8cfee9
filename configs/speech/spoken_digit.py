"""Spoken digits, one of ten, 8000 raw samples at 8 kHz, 2000 recordings to train on. There is no published recipe:
derived from sc10.py, with its model and a hundredth of its updates. Chance 10 %.

    python -m experiments.prepare --dataset=spoken_digit --data_dir=DIR
    python -m experiments.train --config=configs/speech/spoken_digit.py --workdir=runs/digits --config.data_dir=DIR
"""

from configs import base
from configs.speech import sc10
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = sc10.get_config()
    config.task = base.ConfigDict({"name": "spoken_digit", "length": 8000})
    config.model.max_positions = 8000
    config.optimizer.warmup_steps = 1000
    config.train.update(steps=25_000, log_every=100, evaluate_every=250, checkpoint_every=250)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    """The first half second, which holds four fifths of the recordings whole."""
    sc10.tiny(config)
    config.task.length = 4000
    config.train.update(steps=200, batch_size=10, log_every=25, evaluate_every=100, checkpoint_every=100)
