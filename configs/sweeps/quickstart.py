"""Selective copying in three arms, in minutes on two CPU cores: make quickstart.

seqboat: attention on at most the 40 % of tokens that matter. always: attention everywhere. no_attention: none.
"""

from ml_collections import ConfigDict

from configs.sweeps.selective_copy import NEED, arm


def get_config():
    arms = {
        "no_attention": arm("no_attention"),
        "always": arm("always"),
        "seqboat": arm("credit_router", eviction_cost=True, target_rate=NEED),
    }
    for config in arms.values():
        config.train.update(steps=1000, log_every=100, evaluate_every=500, checkpoint_every=500)
    return ConfigDict({"arms": arms, "first_seed": 0, "seeds": 1, "learning_rates": (), "tuning_seeds": 2})
