"""One SeqBoat for every price of attention, on short ListOps: a hypernetwork makes its layers from lambda in [0, 1].

    python -m experiments.train --config=configs/hyper/pareto_listops.py --workdir=runs/pareto

The loss is  cross-entropy + lambda P mean probability of activating,  lambda drawn anew for every batch. Variants:
mip, default and so on (configs/hyper/arms.py); `separate` is the same model without hypernetwork, at lambda P =
--config.train.activation_price.
"""

from configs import base, quickstart
from configs.hyper.arms import apply_arm


def get_config(variant: str = "mip"):
    return conditioned(quickstart.get_config(), variant, price=0.2)


def conditioned(config, variant: str, price: float):
    """A recipe whose layers are generated from the price, up to `price`; "separate" leaves it as it is."""
    config.train.activation_price = price
    config.train.tensorboard = False
    if variant != "separate":
        config.hyper = base.hyper("price")
        config.hyper.select = ("encoder/layers/**",)
        config.hyper.network.hidden = (16, 32)
        apply_arm(config, variant)
    return config
