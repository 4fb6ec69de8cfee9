"""From symbols or numbers to the model width."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqboat.layers.initializers import truncated_normal
from seqboat.ops.positions import sinusoid


class TokenEmbedding(nn.Module):
    """tokens (B, L) of a vocabulary of V -> (B, L, D), entries ~ N(0, 1/D), times `scale`."""

    vocabulary_size: int
    features: int
    scale: float = 1.0

    def setup(self):
        init = nn.initializers.normal(self.features**-0.5)
        self.table = self.param("table", init, (self.vocabulary_size, self.features))

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.table[tokens] * self.scale

    def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """<x, embedding of every symbol>, in float32."""
        return x.astype(jnp.float32) @ self.table.astype(jnp.float32).T


class LinearEmbedding(nn.Module):
    """numbers (B, L, F) -> x W + b, (B, L, D), initialised like every other projection."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L F"]) -> Float[Array, "B L D"]:
        return nn.Dense(self.features, kernel_init=truncated_normal(), name="projection")(x)


class SinusoidalPosition(nn.Module):
    """x (B, L, D) plus sin | cos of the position, in halves of the channels, times a learned scalar, first D^-1/2."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        length, width = x.shape[1:]
        scale = self.param("scale", nn.initializers.constant(1 / math.sqrt(width)), ())
        return x + (scale * sinusoid(length, width))[None].astype(x.dtype)
