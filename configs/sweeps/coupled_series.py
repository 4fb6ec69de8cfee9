"""Anomalies of 24 channels: one VAE with a graph of the channels, the same without its mixing, and the controls.

    python -m experiments.sweep --config=configs/sweeps/coupled_series.py --workdir=runs/series --out=runs/series/table

`shared` is one plain VAE for all channels, `per_channel` one for each, `joint` one of the whole window. All learn the
graph by its own term. The small sizes, a series that no earlier run has read, and the same steps and rate for all.
"""

from ml_collections import ConfigDict

from configs.synthetic import coupled_series

ARMS = {
    "graph": {},
    "shared": {"share": 0.0},
    "per_channel": {"share": 0.0, "vae": "per_channel"},
    "joint": {"share": 0.0, "vae": "joint"},
}


def get_config():
    arms = {name: coupled_series.get_config("tiny") for name in ARMS}
    for name, arm in arms.items():
        arm.model.update(ARMS[name])
        arm.task.data_seed = 2
    return ConfigDict({"arms": arms, "first_seed": 40, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
