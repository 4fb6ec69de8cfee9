"""Path-X (Long Range Arena): Pathfinder with 128 x 128 pixels, a sequence of 16,384. Chance 50 %.

The published recipe: 6 layers (its launch script asks for 4, which its architecture overrides), d 128, z 64, h 256,
window 256, BatchNorm over all devices before the layer, squared-ReLU attention, positions relative in the original
sequence and a scaled sinusoid, the whole kernel, AdamW 0.01 with a quadratic warm-up, 125,000 steps of 128 pictures
in 8 parts, decay 0.01, the hard pictures; eight V100 of 32 GB.
Best verified published result: 98.58 % (S5, Smith et al. 2023). Here: docs/results.md.

    python -m experiments.prepare --dataset=pathfinder/128_hard --data_dir=DIR
    python -m experiments.train --config=configs/lra/pathx.py --workdir=runs/pathx --config.data_dir=DIR
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.update(name="pathfinder", dataset="pathfinder/128_hard", resolution=128, mean=0.5, std=0.5)
    config.model.update(layers=6, features=128, key_size=64, value_size=256, window_size=256, max_positions=16_384)
    config.model.update(norm="batch", norm_placement="pre", attention_function="relu2")
    config.model.mixer.truncation = 16_384
    config.model.update(sinusoid=True, embedding_init="normal")
    config.optimizer.update(learning_rate=0.01, warmup_steps=25_000, warmup_power=2.0, weight_decay=0.01)
    config.train.update(steps=125_000, batch_size=128, accumulate=8)
    config.train.update(log_every=100, evaluate_every=1250, checkpoint_every=1250)
    apply_variant(config, variant, tiny=_tiny)
    return config


def _tiny(config):
    config.model.update(layers=2, features=32, key_size=16, value_size=64, window_size=64)
    config.optimizer.warmup_steps = 50
    config.train.update(steps=200, batch_size=8, accumulate=1, log_every=10, evaluate_every=100, checkpoint_every=100)
