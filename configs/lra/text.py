"""Byte-level IMDB reviews (Long Range Arena, Text): positive or negative.

The published recipe: 4 layers, d 128, z 64, h 256, window 128, ScaleNorm after the layer, softmax, slot positions,
kernel cut at 1024 lags, AdamW 0.004, 25,000 steps of 50 reviews of up to 4000 bytes, dropout 0.1, decay 0.01.

    python -m experiments.train --config=configs/lra/text.py --workdir=runs/text --config.data_dir=DIR
    python -m experiments.train --config=configs/lra/text.py:tiny ...     a shorter, narrower run for two CPU cores

Selection is on 10 % of the training reviews, split off by a seeded stratified rule; IMDB has no validation split.
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.name = "text"
    config.task.length = 4000
    config.task.validation_fraction = 0.1
    config.task.validation_seed = 0
    config.model.update(layers=4, features=128, key_size=64, value_size=256, window_size=128, max_positions=4002)
    config.model.update(norm="scale", norm_placement="post", position="slot", dropout=0.1)
    config.model.mixer.truncation = 1024
    config.model.router.temperature_scale = 0.3
    config.optimizer.update(learning_rate=0.004, warmup_steps=10_000, weight_decay=0.01)
    config.train.update(steps=25_000, batch_size=50, log_every=100, evaluate_every=500, checkpoint_every=500)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    config.task.length = 512
    config.model.update(layers=2, features=48, key_size=24, value_size=96, window_size=32)
    config.optimizer.warmup_steps = 100
    config.train.update(steps=800, batch_size=32, log_every=50, evaluate_every=400, checkpoint_every=400)
