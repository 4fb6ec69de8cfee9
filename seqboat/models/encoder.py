"""A stack of SeqBoat layers: one scan, so compile time does not grow with depth."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.seqboat import KEPT, LayerConfig, SeqBoatLayer
from seqboat.layers.sparse_activation import ActivationStats

Remat = Literal["none", "selective", "layer"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """`layers` SeqBoat layers of one `layer` config. `remat` says what the backward pass finds stored inside a layer:
    "none" everything, "selective" what is dear to compute again (`layers.seqboat.KEPT`), "layer" nothing but the
    layer's input.
    `final_norm_affine` False leaves scale and offset out of the norm that follows pre-norm layers."""

    layer: LayerConfig
    layers: int
    remat: Remat = "selective"
    final_norm_affine: bool = True

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"layers={self.layers}: must be at least 1")
        if self.remat not in ("none", "selective", "layer"):
            raise ValueError(f"remat={self.remat!r}: must be one of none, selective, layer")


class Encoder(nn.Module):
    """x (B, L, D) -> (B, L, D) and the stacked stats of all layers, each with a leading axis of layers.

    A final norm follows if norms are placed before the layers. Padding leaves as it is computed: mask it after.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool = False
    ) -> tuple[Float[Array, "B L D"], ActivationStats]:
        config, layer = self.config, SeqBoatLayer
        if config.layer.layout.axes:  # a layer's parameters are whole for as long as it runs
            layer = nn.map_variables(layer, "params", trans_in_fn=config.layer.layout.gather)
        if config.remat != "none":
            keep = jax.checkpoint_policies.save_only_these_names(*KEPT)
            policy = keep if config.remat == "selective" else None
            layer = nn.remat(layer, static_argnums=(3,), prevent_cse=False, policy=policy)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "batch_stats": 0, "taps": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.layers,
        )
        x = x.astype(jnp.dtype(config.layer.dtype))
        x, stats = scanned(config.layer, name="layers")(x, valid, train)
        if config.layer.norm_placement == "pre":
            final = dataclasses.replace(config.layer, norm_affine=config.final_norm_affine)
            x = final.make_norm("final_norm")(x, valid, train)
        return x, stats
