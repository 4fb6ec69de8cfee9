"""The arms of docs/router.md on selective copying, from ten seeds that no earlier experiment used.

    python -m experiments.sweep --config=configs/sweeps/selective_copy.py --workdir=runs/copy --out=runs/copy/table

40 % of the tokens matter. `strided` and `random` have that rate, but choose whatever the tokens are; `whole` always
attends to everything, and is what attention can reach at best.
"""

from ml_collections import ConfigDict

from configs.synthetic import selective_copy

NEED = 0.4


def get_config():
    arms = {
        "none": arm("no_attention"),
        "strided": arm("strided", activation_rate=NEED),
        "random": arm("random", activation_rate=NEED),
        "always": arm("always"),
        "whole": arm("full,always"),
        "published": arm("paper"),
        "credit": arm("credit_router", eviction_cost=False),
        "credit_for_all": arm("credit_router", eviction_cost=False, credit_share=1.0),
        "eviction_cost": arm("credit_router", eviction_cost=True),
        "target_rate": arm("credit_router", eviction_cost=True, target_rate=NEED),
        "mixture_of_depths": arm("mod", capacity=NEED),
    }
    return ConfigDict({"arms": arms, "first_seed": 30, "seeds": 10, "learning_rates": (), "tuning_seeds": 2})


def arm(variant: str, activation_rate: float | None = None, **router) -> ConfigDict:
    """The recipe's variant with these fields of its router."""
    config = selective_copy.get_config(variant)
    if activation_rate is not None:
        config.model.activation_rate = activation_rate
    config.model.router.update(router)
    return config
