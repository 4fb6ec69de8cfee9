"""Induction (configs/synthetic/induction.py), trained on 64 tokens; then streams, as docs/router.md tells.

    python -m experiments.sweep --config=configs/sweeps/induction.py --workdir=runs/induction --out=runs/induction/table
    python -m examples.extrapolate --workdir=runs/induction --longest=14 --out=runs/lengths

Five arms with a window of 8: the credit router, the same with a penalty on activation of 0.1 from the start, the
published router, attention everywhere, and none. The penalty and the steps were chosen on `credit_penalty` and seed 0
alone, by its accuracy on streams.
"""

from ml_collections import ConfigDict

from configs.synthetic import induction


def get_config():
    arms = {
        "credit": induction.get_config("credit_router"),
        "credit_penalty": induction.get_config("credit_router"),
        "published": induction.get_config("paper"),
        "always": induction.get_config("always"),
        "none": induction.get_config("no_attention"),
    }
    arms["credit_penalty"].train.activation_penalty = 0.1
    return ConfigDict({"arms": arms, "first_seed": 60, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
