"""The arms of experiments with hypernetworks: what magnitude-invariant parametrizations are made of, and rivals."""

from ml_collections import ConfigDict

ARMS = ("default", "encoding", "residual", "mip", "hyperfan", "encoding_hyperfan", "zero_head")


def apply_arm(config: ConfigDict, arm: str) -> None:
    """default: raw hyper-input, nothing added to. encoding, residual: each half of mip alone. hyperfan: scaled to keep
    activations. zero_head: mip that starts as the target. Raises ValueError for another."""
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: there are {', '.join(ARMS)}")
    network = config.hypernetwork.network
    network.encoding.kind = "cos_sin" if arm in ("encoding", "mip", "encoding_hyperfan", "zero_head") else "none"
    network.residual = arm in ("residual", "mip", "zero_head")
    network.init = {"hyperfan": "hyperfan_in", "encoding_hyperfan": "hyperfan_in", "zero_head": "zero"}.get(
        arm, "fan_out"
    )
