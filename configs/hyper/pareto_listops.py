"""One SeqBoat for every penalty on attention, on short ListOps: a hypernetwork makes its layers from lambda in [0, 1].

    python -m experiments.train --config=configs/hyper/pareto_listops.py --workdir=runs/pareto

The loss is  cross-entropy + lambda P mean probability of activating,  lambda drawn anew for every batch. Variants:
mip, default and so on (configs/hyper/arms.py); `separate` is the same model without hypernetwork, at lambda P =
--config.train.activation_penalty.
"""

from configs import base, quickstart
from configs.hyper.arms import apply_arm


def get_config(variant: str = "mip"):
    return conditioned(quickstart.get_config(), variant, penalty=0.2)


def conditioned(config, variant: str, penalty: float):
    """A recipe whose layers are generated from the penalty, up to `penalty`; "separate" leaves it as it is."""
    config.train.activation_penalty = penalty
    if variant != "separate":
        config.hypernetwork = base.hyper("penalty")
        config.hypernetwork.select = ("encoder/layers/**",)
        config.hypernetwork.network.hidden = (16, 32)
        apply_arm(config, variant)
    return config
