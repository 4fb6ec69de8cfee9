"""Digits classified by networks that are generated from eight uniform random numbers: a Bayesian hypernetwork.

    python -m experiments.train --config=configs/hyper/noise.py:mip --workdir=runs/noise

Arms as in configs/hyper/rotation.py.
"""

from configs.hyper import rotation


def get_config(variant: str = "mip"):
    config = rotation.get_config(variant)
    config.hypernetwork.condition = "noise"
    config.hypernetwork.network.encoding.inputs = 8
    return config
