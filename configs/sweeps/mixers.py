"""What each mixer does with selective copying on its own, and with attention where the router activates it.

    python -m experiments.sweep --config=configs/sweeps/mixers.py --workdir=runs/mixers --out=docs/_data/results/mixers

Data, steps and learning rate are those of configs/synthetic/selective_copy.py, whatever the mixer: nothing was tuned
for one of them. Every mixer has its defaults, so the EMA 16 states per channel and not that config's 8; parameters are
not equal.
"""

from ml_collections import ConfigDict

from configs.synthetic import selective_copy

MIXERS = ("ema", "lru", "s5", "ssd", "elman", "gru", "lstm")
# With attention, those that differ most: a fixed filter, a selective one, a gated cell.
ATTENDING = ("ema", "ssd", "lstm")


def get_config():
    arms = {f"{name}": selective_copy.get_config(f"{name},no_attention") for name in MIXERS}
    arms |= {f"{name}_and_attention": selective_copy.get_config(f"{name},credit_router") for name in ATTENDING}
    return ConfigDict({"arms": arms, "first_seed": 40, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
