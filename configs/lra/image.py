"""Image (Long Range Arena): CIFAR-10 in gray, 1024 pixels one by one, ten classes. Chance 10 %.

The published recipe: 8 layers, d 160, z 96, h 320, window 128, BatchNorm before the layer, squared-ReLU attention,
positions relative in the original sequence and a scaled sinusoid, kernel cut at 1024 lags, AdamW 0.01, 180,000 steps
of 50 pictures, decay 0.02, pixels (p / 255 - 0.48) / 0.24; one V100 of 32 GB.
Best verified published result: 90.44 % (MEGA, Ma et al. 2023, table 2). Here: docs/results.md.

    python -m experiments.prepare --dataset=cifar10 --data_dir=DIR
    python -m experiments.train --config=configs/lra/image.py --workdir=runs/image --config.data_dir=DIR
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.update(name="image", mean=0.48, std=0.24)
    config.model.update(layers=8, features=160, key_size=96, value_size=320, window_size=128, max_positions=1024)
    config.model.update(norm="batch", norm_placement="pre", attention_function="relu2")
    config.model.mixer.truncation = 1024
    config.model.update(sinusoid=True, embedding_init="normal")
    config.model.router.temperature_scale = 0.4
    config.optimizer.update(learning_rate=0.01, warmup_steps=9000, weight_decay=0.02)
    config.train.update(steps=180_000, batch_size=50, log_every=100, evaluate_every=900, checkpoint_every=900)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    config.model.update(layers=2, features=48, key_size=24, value_size=96, window_size=32)
    config.optimizer.warmup_steps = 50
    config.train.update(steps=250, batch_size=25, log_every=25, evaluate_every=125, checkpoint_every=125)
