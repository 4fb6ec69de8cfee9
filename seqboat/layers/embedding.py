"""Embedding of symbols or numbers into the model width."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqboat.layers.initializers import truncated_normal
from seqboat.ops.positions import sinusoid
from seqboat.ops.tables import look_up
from seqboat.parallel.rules import SINGLE_DEVICE, Layout


class TokenEmbedding(nn.Module):
    """tokens (B, L) of a vocabulary of V -> (B, L, D), entries ~ N(0, 1/D), times `scale`.

    A token outside 0..V-1 gives a row of NaN, so padding may be anything if its rows are masked afterwards.
    """

    vocabulary_size: int
    features: int
    scale: float = 1.0

    def setup(self):
        init = nn.initializers.normal(self.features**-0.5)
        self.table = self.param("table", init, (self.vocabulary_size, self.features))

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return look_up(self.table, tokens) * self.scale

    def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """The inner product of x with every symbol's embedding, in float32."""
        return x.astype(jnp.float32) @ self.table.astype(jnp.float32).T


class LinearEmbedding(nn.Module):
    """numbers (B, L, F) -> x W + b, (B, L, D).

    Initialised like every other projection or, with "normal", W ~ N(0, 1) and b ~ N(0, 0.1^2), as in the published
    models for pixels and samples (Ma et al. 2023, Ren et al. 2023).
    """

    features: int
    initializer: Literal["projection", "normal"] = "projection"

    @nn.compact
    def __call__(self, x: Float[Array, "B L F"]) -> Float[Array, "B L D"]:
        kernel_init, bias_init = truncated_normal(), nn.initializers.zeros
        if self.initializer == "normal":
            kernel_init, bias_init = nn.initializers.normal(1.0), nn.initializers.normal(0.1)
        return nn.Dense(self.features, kernel_init=kernel_init, bias_init=bias_init, name="projection")(x)


class SinusoidalPosition(nn.Module):
    """x (B, L, D) plus sin | cos of the position, in halves of the channels, times a learned scalar, initially D^-1/2.

    `layout` says how sequences are split over devices.
    """

    layout: Layout = SINGLE_DEVICE

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        length, width = x.shape[1:]
        scale = self.param("scale", nn.initializers.constant(1 / math.sqrt(width)), ())
        table = jnp.asarray(sinusoid(length * self.layout.pieces, width))
        if self.layout.length:
            table = jax.lax.dynamic_slice_in_dim(table, self.layout.start(length), length)
        return x + (scale * table)[None].astype(x.dtype)
