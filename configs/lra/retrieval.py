"""Retrieval (Long Range Arena): two papers of AAN as 4000 bytes each, does one cite the other? Chance 50 %.

The published recipe: 6 layers, d 128, z 64, h 256, window 128, ScaleNorm after the layer, softmax, positions relative
in the original sequence, kernel cut at 1024 lags, AdamW 0.003, 91,960 steps of 64 pairs in 8 parts, dropout 0.1,
decay 0.04; one V100 of 32 GB.
Best verified published result: 91.76 % (MEGALODON, Ma et al. 2024, table 6). Here: docs/results.md.

    python -m experiments.prepare --dataset=aan --data_dir=DIR
    python -m experiments.train --config=configs/lra/retrieval.py --workdir=runs/retrieval --config.data_dir=DIR
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config(model="retrieval")
    config.task.update(name="retrieval", length=4000)
    config.model.update(layers=6, features=128, key_size=64, value_size=256, window_size=128, max_positions=4002)
    config.model.update(norm="scale", norm_placement="post", dropout=0.1)
    config.model.mixer.truncation = 1024
    config.model.router.temperature_scale = 0.3
    config.optimizer.update(learning_rate=0.003, warmup_steps=10_000, weight_decay=0.04)
    config.train.update(steps=91_960, batch_size=64, accumulate=8)
    config.train.update(log_every=100, evaluate_every=2299, checkpoint_every=2299)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    config.task.length = 1024
    config.model.update(layers=2, features=48, key_size=24, value_size=96, window_size=32)
    config.optimizer.warmup_steps = 100
    config.train.update(steps=1000, batch_size=16, accumulate=1, log_every=50, evaluate_every=250, checkpoint_every=250)
