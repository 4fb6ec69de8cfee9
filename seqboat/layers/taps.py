"""Named values inside a layer, for analysis: `model.apply(variables, ..., mutable=["taps"])` returns them.

One name per value that matters; the names are interface. Shapes for one layer (M modules to choose from, here the GAU):

    pre_norm (B, L, D)          what enters the SSM
    ssm_out, skip (B, L, D)     what leaves it, and the always-on path
    router_logits (B, L, M, 2)  active, confidence (B, L, M)
    q, k (B, L, Z)              v, gate, attended (B, L, E)
    gau_out (B, L, D)           before its confidence
    resid (B, L, D)             what leaves the layer

Values of packed rows are put back in their places, zero where inactive. A tap that is not asked for costs nothing.
"""

import flax.linen as nn
from jaxtyping import Array


def tap(module: nn.Module, name: str, value: Array) -> None:
    """Publish a value under a name, if the caller asked for taps."""
    if not module.is_initializing():
        module.sow("taps", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
