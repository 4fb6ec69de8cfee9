"""An autoencoder of vectors by dense layers, whose latents may be quantized (Hsu et al. 2023, arXiv 2305.18378).

Quantized, every latent is one of its own few learned values. With strong weight decay this favours codes in which a
latent means the same everywhere; `seqboat.interp.infomec` measures how far that is so.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqboat.choices import given
from seqboat.layers.initializers import deep
from seqboat.layers.router import ActivationStats, no_decisions
from seqboat.layers.terms import term


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """J `latents` of vectors of `width` W, and from them the vectors again, or others of `target_width`. `hidden` are
    the widths of the encoder's layers; the decoder has them in reverse.

    `quantized` gives every latent `values` learned values. Terms of the loss: `quantization` times the mean of
    (sg(z) - q)^2, which moves the values, and `commitment` times that of (z - sg(q))^2, which moves the encoder.
    """

    width: int = given()
    target_width: int | None = given()
    latents: int = 8
    hidden: tuple[int, ...] = (128, 128)
    quantized: bool = True
    values: int = 10
    quantization: float = 0.01
    commitment: float = 0.01

    def __post_init__(self):
        for field in ("width", "latents"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.values < 2:
            raise ValueError(f"values={self.values}: must be at least 2, as one value tells nothing")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden}: must be one or more widths of at least 1")
        for field in ("quantization", "commitment"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)}: must not be negative")


class Code(NamedTuple):
    """`logits` (B, 1, W'), the reconstructions; the stats of no layers; `latents` (B, J), quantized if they are."""

    logits: Array
    layers: ActivationStats
    latents: Array


class Autoencoder(nn.Module):
    """inputs (B, 1, W) -> `Code`; `lengths` are 0 for rows that are not counted.

        z = encoder(x),    q_j = the value of latent j nearest to z_j,    x^ = decoder(q), or decoder(z)

    The gradient of q goes to z unchanged ("straight through"); the values learn from their term alone.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "B 1 W"], lengths: Int[Array, "B"], train: bool = False) -> Code:
        config = self.config
        z = self._layers("encoder", inputs[:, 0], config.hidden, config.latents)
        z = self._quantize(z) if config.quantized else z
        out = config.width if config.target_width is None else config.target_width
        logits = self._layers("decoder", z, config.hidden[::-1], out)
        stats = no_decisions((lengths > 0).sum(keepdims=True).astype(jnp.float32))
        return Code(logits[:, None], stats, z)

    def _layers(self, name: str, x: Float[Array, "B K"], hidden: Sequence[int], out: int) -> Float[Array, "B M"]:
        kernel, bias = deep("he", "relu")
        for index, width in enumerate(hidden):
            x = nn.relu(nn.Dense(width, kernel_init=kernel, bias_init=bias, name=f"{name}_{index}")(x))
        return nn.Dense(out, name=f"{name}_out")(x)

    def _quantize(self, z: Float[Array, "B J"]) -> Float[Array, "B J"]:
        config, fixed = self.config, jax.lax.stop_gradient
        start = lambda key: jnp.tile(jnp.linspace(-0.5, 0.5, config.values), (config.latents, 1))
        q = nearest(z, self.param("values", start))
        count = jnp.float32(z.size)
        term(self, "quantization", config.quantization, jnp.square(fixed(z) - q).sum(), count)
        term(self, "commitment", config.commitment, jnp.square(z - fixed(q)).sum(), count)
        return fixed(q) + (z - fixed(z))  # exactly q; z + fixed(q - z) rounds


def nearest(z: Float[Array, "B J"], values: Float[Array, "J V"]) -> Float[Array, "B J"]:
    """Of every latent the value nearest to it, the first of equally near ones."""
    index = jnp.abs(z[..., None] - values[None]).argmin(-1, keepdims=True)
    return jnp.take_along_axis(jnp.broadcast_to(values, (*z.shape, values.shape[1])), index, axis=-1)[..., 0]


Config, Model = AutoencoderConfig, Autoencoder
