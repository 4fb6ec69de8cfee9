"""Named values inside a layer, for analysis: `model.apply(variables, ..., mutable=["taps"])` returns them.

The names are interface. Shapes for one layer (M modules to choose from, here the GAU):

    pre_norm (B, L, D)          the SSM's input
    ssm_out, skip (B, L, D)     the SSM's output, and the always-on path
    m (B, L, D)                 silu(ssm_out), after dropout: what the router, the skip path and the modules read
    router_logits (B, L, M, 2)  active, confidence (B, L, M)
    q, k (B, L, Z)              v, gate, attended (B, L, E)
    gated (B, L, E)             attended * gate, what W_o reads
    gau_out (B, L, D)           before its confidence
    resid (B, L, D)             the layer's output

A transformer block has `active` to `attended` and `resid`, the rows of its H heads (B, L, H, Z), and

    unit_out (B, L, D)          what it adds, before its confidence

Values of packed rows are scattered back to their elements, zero where inactive. A tap that is not requested costs
nothing.
"""

import flax.linen as nn
from jaxtyping import Array


def tap(module: nn.Module, name: str, value: Array) -> None:
    """Publish a value under a name, if the caller requested taps."""
    if not module.is_initializing():
        module.sow("taps", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
