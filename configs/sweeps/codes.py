"""Tokens of a codebook in two stages, and the controls, at equal parameters: 256 codes in 16 clusters, no attention.

    python -m experiments.sweep --config=configs/sweeps/codes.py --workdir=runs/codes --out=runs/codes/table
    python -m experiments.sweep --config=configs/sweeps/codes.py:digits --workdir=runs/digits --out=runs/digits/table

The source of the first four arms is on the side of two stages: a code depends on its cluster and on the next one. That
of the others is not: it depends on the one before. `digits` has real data instead, and attention to all before. Data,
steps and learning rate are the same for all arms of a table.
"""

from ml_collections import ConfigDict

from configs.synthetic import codes

ARMS = {"two_stages": "tiny", "plain": "tiny,plain", "factored": "tiny,factored", "shuffled": "tiny,shuffled"}


def get_config(data: str = "source"):
    if data not in ("source", "digits"):
        raise ValueError(f"unknown data {data!r}: there are source and digits")
    suffix = ",digits" if data == "digits" else ""
    arms = {name: codes.get_config(variant + suffix) for name, variant in ARMS.items()}
    if data == "source":
        for name in ("two_stages", "plain", "factored"):
            arms[f"{name}_previous"] = arm = codes.get_config(ARMS[name])
            arm.task.neighbour = "previous"
    return ConfigDict({"arms": arms, "first_seed": 40, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
