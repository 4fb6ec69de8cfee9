"""Speech Commands, ten words, 16,000 raw samples. Chance about 10 %.

The published recipe: 8 layers, d 60, z 30, h 120, window 128, BatchNorm before the layer, squared-ReLU attention, slot
positions and a scaled sinusoid, kernel cut at 4000 lags, AdamW 0.01, 250,000 steps of 20 clips, decay 0.01; hardware
as for Long Range Arena, one V100 of 32 GB.
Best verified published result: 98.14 % (MEGALODON, Ma et al. 2024, table 7). The published split depends on the
order of a directory; ours does not, so results compare within a few tenths only. Here: docs/results.md.

    python -m experiments.prepare --dataset=speech_commands/sc10 --data_dir=DIR
    python -m experiments.train --config=configs/speech/sc10.py --workdir=runs/sc10 --config.data_dir=DIR
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.update(name="speech_commands", words=10, length=16_000)
    config.model.update(layers=8, features=60, key_size=30, value_size=120, window_size=128)
    config.model.update(norm="batch", norm_placement="pre", attention_function="relu2", position="slot")
    config.model.update(sinusoid=True, embedding_init="normal", max_positions=16_000)
    config.model.mixer.truncation = 4000
    config.optimizer.update(learning_rate=0.01, warmup_steps=10_000, weight_decay=0.01)
    config.train.update(steps=250_000, batch_size=20, log_every=100, evaluate_every=1250, checkpoint_every=1250)
    apply_variant(config, variant, tiny=tiny)
    return config


def tiny(config):
    config.model.update(layers=2, features=32, key_size=16, value_size=64, window_size=32)
    config.optimizer.update(warmup_steps=20, learning_rate=0.005)
    config.train.update(steps=200, batch_size=8, log_every=20, evaluate_every=100, checkpoint_every=100)
