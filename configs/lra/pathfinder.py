"""Pathfinder (Long Range Arena): are two dots on one dashed path? 32 x 32 pixels, one by one. Chance 50 %.

The published recipe: 6 layers, d 128, z 64, h 256, window 128, BatchNorm before the layer, squared-ReLU attention,
positions relative in the original sequence and a scaled sinusoid, kernel cut at 1024 lags, AdamW 0.01, 250,000 steps
of 128 pictures, decay 0.01, the hard pictures (14 dashes); one V100 of 32 GB.
Best verified published result: 98.13 % (MEGALODON, Ma et al. 2024, table 6). Here: docs/results.md.

    python -m experiments.prepare --dataset=pathfinder/32_hard --data_dir=DIR
    python -m experiments.train --config=configs/lra/pathfinder.py --workdir=runs/pathfinder --config.data_dir=DIR
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.update(name="pathfinder", dataset="pathfinder/32_hard", resolution=32, mean=0.5, std=0.5)
    config.model.update(layers=6, features=128, key_size=64, value_size=256, window_size=128, max_positions=1024)
    config.model.update(norm="batch", norm_placement="pre", attention_function="relu2")
    config.model.mixer.truncation = 1024
    config.model.update(sinusoid=True, embedding_init="normal")
    config.optimizer.update(learning_rate=0.01, warmup_steps=50_000, weight_decay=0.01)
    config.train.update(steps=250_000, batch_size=128, log_every=100, evaluate_every=1250, checkpoint_every=1250)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    """Easy pictures (6 dashes), an eighth of the data set: prepare --dataset=pathfinder/32_easy --scale=0.125."""
    config.task.dataset = "pathfinder/32_easy_0.125"
    config.model.update(layers=2, features=48, key_size=24, value_size=96, window_size=32)
    config.optimizer.update(warmup_steps=50, learning_rate=0.005)
    config.train.update(steps=600, batch_size=32, log_every=50, evaluate_every=200, checkpoint_every=200)
