"""ListOps (Long Range Arena): expressions of 501 to 1999 tokens, ten classes.

The published recipe: 6 layers, d 80, z 64, h 160, window 128, LayerNorm after the layer, softmax, positions relative in
the original sequence, kernel cut at 1024 lags, AdamW 0.004, 90,000 steps of 64 expressions, dropout 0.1, decay 0.001.

    python -m experiments.prepare --dataset=listops --data_dir=DIR
    python -m experiments.train --config=configs/lra/listops.py --workdir=runs/listops --config.data_dir=DIR
"""

from ml_collections import ConfigDict

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.update(name="listops", length=2000)
    config.task.dataset = base.placeholder(str)  # None is the whole; a part is listops/0.125
    config.model.update(layers=6, features=80, key_size=64, value_size=160, window_size=128, max_positions=2002)
    config.model.update(norm="layer", norm_placement="post", dropout=0.1)
    config.model.mixer.truncation = 1024
    config.model.router.temperature_scale = 0.3
    config.optimizer.update(learning_rate=0.004, warmup_steps=27_000, weight_decay=0.001)
    config.train.update(steps=90_000, batch_size=64, log_every=100, evaluate_every=1500, checkpoint_every=1500)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    """Whole expressions of the same trees, but of 40 to 128 tokens: cut ones have no answer. Needs no data."""
    config.task = ConfigDict({"name": "short_listops", "tokens": "40-128"})
    config.task.update(train_examples=40_000, validation_examples=2_000, test_examples=2_000, data_seed=0)
    config.model.update(layers=2, features=48, key_size=24, value_size=96, window_size=32, dropout=0.0)
    config.optimizer.warmup_steps = 100
    config.train.update(steps=1500, batch_size=32, log_every=50, evaluate_every=500, checkpoint_every=500)
