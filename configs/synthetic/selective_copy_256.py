"""Selective copying over 256 positions: 16 of them hold one of 16 symbols, then 16 slots ask for them in order.

12 % of the elements matter. The window of 32 slots holds all of them if the blanks stay inactive. The shape is that of
Gu and Dao (2023, arXiv 2312.00752), who have 4096 positions.

    python -m experiments.train --config=configs/synthetic/selective_copy_256.py:credit_router --workdir=runs/copy_256
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    config.task.update(length=256, symbols=16)
    config.model.max_positions = 272
    config.model.window_size = 32
    config.train.update(steps=4000, evaluate_every=2000, checkpoint_every=2000)
    apply_variant(config, variant, tiny=lambda config: None)
    return config
