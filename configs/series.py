"""A VAE with a graph of channels (StackVAE-G) on a series of your own: an npz of `x` (T, C), and if there are labels
`anomalies` (T,).

    python -m experiments.train --config=configs/series.py --config.task.files='("series.npz",)' --workdir=runs/own
    python -m experiments.evaluate --workdir=runs/own

The first 60 % are for training and should be normal; config.task.fractions cuts elsewhere. The sizes are those of
configs/synthetic/coupled_series.py.
"""

from configs import base
from configs.synthetic import coupled_series


def get_config(variant: str = "paper"):
    config = coupled_series.get_config(variant)
    config.task = type(config.task)(
        {"name": "series", "files": (), "fractions": (0.6, 0.1, 0.3), "length": 32, "channels": base.placeholder(int)}
    )
    return config
