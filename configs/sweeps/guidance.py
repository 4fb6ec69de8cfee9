"""What guidance by another network is worth on selective copying: for a recurrent cell, and for the published router.

    python -m experiments.train --config=configs/synthetic/selective_copy.py:transformer --workdir=runs/guides/full
    python -m experiments.train --config=configs/synthetic/selective_copy.py:always --workdir=runs/guides/always
    python -m experiments.sweep --config=configs/sweeps/guidance.py --workdir=runs/guidance --out=runs/guidance/table

An Elman cell without attention is guided by a transformer that sees everything, the published router by a SeqBoat that
attends everywhere, for the first fifth of the steps. Guides are trained, not trained, or trained with their elements in
another order: `shuffled` knows nothing of an element and must not help. Nothing was tuned for an arm.
"""

from ml_collections import ConfigDict

from configs import base
from configs.synthetic import selective_copy

# Variant of the guided model, variant of its guide, and where that was trained.
GUIDED = {
    "elman": ("no_attention,elman", "transformer", "runs/guides/full"),
    "published": ("paper", "always", "runs/guides/always"),
}


def get_config():
    arms = {}
    for name, (variant, guide, run) in GUIDED.items():
        guides = {
            "guided": {"run": run},
            "guided_untrained": {"like": selective_copy.get_config(guide).model.to_dict()},
            "guided_shuffled": {"run": run, "shuffled": True},
        }
        arms[name] = selective_copy.get_config(variant)
        for kind, fields in guides.items():
            arms[f"{name}_{kind}"] = selective_copy.get_config(variant)
            arms[f"{name}_{kind}"].objectives = base.objective("guidance", **fields)
    return ConfigDict({"arms": arms, "first_seed": 40, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
