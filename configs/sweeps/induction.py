"""Induction (configs/synthetic/induction.py): trained on 64 tokens, then read as streams of up to a million.

    python -m experiments.sweep --config=configs/sweeps/induction.py --workdir=runs/induction --out=runs/induction/table
    python -m examples.extrapolate --workdir=runs/induction --longest=14 --out=runs/induction/lengths
    python -m examples.extrapolate --workdir=runs/induction/learned --sequences=8 --out=runs/induction/million

Five arms with a window of 8: the credit router with a penalty on activation of 0.1 (`learned`) and without, the
published router without, attention everywhere, and none. The penalty and the steps were chosen on `learned` and seed 0
alone, by its accuracy on streams.
"""

from ml_collections import ConfigDict

from configs.synthetic import induction


def get_config():
    arms = {
        "learned": induction.get_config("credit_router"),
        "without_penalty": induction.get_config("credit_router"),
        "published": induction.get_config("paper"),
        "always": induction.get_config("always"),
        "none": induction.get_config("no_attention"),
    }
    for name in set(arms) - {"learned"}:
        arms[name].train.activation_penalty = 0.0
    return ConfigDict({"arms": arms, "first_seed": 60, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
