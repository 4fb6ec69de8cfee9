"""enwik8: 100 million bytes of Wikipedia, 90 / 5 / 5 million, bits per byte.

The published recipe: 14 causal layers, d 616, z 128, h 1232, window 1024, LayerNorm before the layer (the last without
scale and offset), softmax, rotary positions, kernel cut at 2048 lags, RAdam 0.005 from 0.002 over 24,000 steps,
400,000 steps of 8 blocks of 8192 bytes, dropout 0.15, decay 0.1, clipping at 0.25; eight A100 of 40 GB.
Its authors: about 1.0233 bits per byte (their repository). Best verified result near this size: 0.994 (Expire-Span,
38 million parameters). Here: docs/results.md.

    python -m experiments.prepare --dataset=enwik8 --data_dir=DIR
    python -m experiments.train --config=configs/lm/enwik8.py --workdir=runs/enwik8 --config.data_dir=DIR
    python -m experiments.evaluate --workdir=runs/enwik8      1192 new bytes after up to 7000 of context, each byte once
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config(model="language_model")
    config.task.update(name="corpus", dataset="enwik8", files=(), fractions=(0.9, 0.05, 0.05))
    config.task.update(length=8192, context=7000, carry_state=False)
    config.task.evaluation_bytes = base.placeholder(int)
    config.task.repeat_distance = base.placeholder(int)
    config.model.update(layers=14, features=616, key_size=128, value_size=1232, window_size=1024, dropout=0.15)
    config.model.update(norm="layer", norm_placement="pre", final_norm_affine=False, position="rotary")
    config.model.mixer.truncation = 2048
    config.optimizer.update(name="radam", learning_rate=0.005, warmup_steps=24_000, warmup_start=2e-3)
    config.optimizer.update(weight_decay=0.1, clip_norm=0.25)
    config.train.update(steps=400_000, batch_size=8, log_every=100, evaluate_every=4000, checkpoint_every=2000)
    apply_variant(config, variant, tiny=tiny)
    return config


def tiny(config):
    config.task.update(length=512, context=256, evaluation_bytes=200_000)
    config.model.update(layers=2, features=96, key_size=48, value_size=192, window_size=32, dropout=0.0)
    config.optimizer.update(name="adamw", learning_rate=0.004, warmup_steps=100, warmup_start=1e-7)
    config.optimizer.update(weight_decay=0.01, clip_norm=1.0)
    config.train.update(steps=1000, batch_size=16, log_every=50, evaluate_every=500, checkpoint_every=500)
