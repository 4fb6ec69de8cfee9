"""Selective copying: 8 of 32 positions hold a symbol, then 8 slots ask for them in order. Chance is 1 in 16.

A study of the router (docs/router.md): which elements matter, 40 % of them, is known, and the window of 16 slots
reaches all of them only if the others stay inactive.

    python -m experiments.train --config=configs/synthetic/selective_copy.py --workdir=runs/copy
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config(model="language_model")
    config.task.update(name="selective_copy", length=32, symbols=8, alphabet=16)
    config.task.update(train_examples=1_000_000, test_examples=2048, data_seed=0)
    config.model.update(layers=2, features=64, key_size=32, value_size=128, window_size=16)
    config.model.mixer.state_size = 8
    config.model.update(norm="layer", norm_placement="pre", max_positions=64, block_size=64, remat="none")
    config.optimizer.update(learning_rate=3e-3, warmup_steps=100, final_learning_rate=1e-4, schedule="cosine")
    config.train.update(steps=1600, batch_size=32, log_every=200, evaluate_every=800, checkpoint_every=800)
    apply_variant(config, variant, tiny=lambda config: None)
    return config
