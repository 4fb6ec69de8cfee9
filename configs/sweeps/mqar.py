"""Multi-query associative recall: 4 pairs among 64 positions, eight arms, five seeds that no earlier experiment used.

    python -m experiments.sweep --config=configs/sweeps/mqar.py --workdir=runs/mqar --out=runs/mqar/table

12 of 64 positions matter. `strided` and `random` have that rate, but choose whatever the tokens are; `whole` always
attends to everything, and is what attention can reach at best. The number of steps and the learning rate, the same for
all arms, were chosen on `whole` and seed 0 alone: of 3e-3 (0.882 in validation after 1600 steps) and 1e-2 (0.997).
"""

from ml_collections import ConfigDict

from configs.synthetic import mqar

NEED = 12 / 64


def get_config():
    arms = {
        "none": _arm("no_attention"),
        "strided": _arm("strided", activation_rate=NEED),
        "random": _arm("random", activation_rate=NEED),
        "always": _arm("always"),
        "whole": _arm("full,always"),
        "published": _arm("paper"),
        "eviction_cost": _arm("credit_router"),
        "mixture_of_depths": _arm("mod"),
    }
    return ConfigDict({"arms": arms, "first_seed": 30, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})


def _arm(variant: str, **model) -> ConfigDict:
    config = mqar.get_config(variant)
    config.model.update(model)
    if config.model.router.rule == "capacity":
        config.model.router.capacity = NEED
    config.optimizer.learning_rate = 1e-2
    config.train.update(steps=2000, evaluate_every=1000, checkpoint_every=1000)
    return config
