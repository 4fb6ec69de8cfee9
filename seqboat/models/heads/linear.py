"""One affine map."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.layers.initializers import truncated_normal
from seqboat.models.head import Head, HeadConfig


@dataclasses.dataclass(frozen=True)
class Config(HeadConfig):
    """No fields."""

    def make(self, features: int, outputs: int, **owner: Any) -> Head:
        return Linear(outputs, **owner)


class Linear(Head):
    """x (..., D) -> x W + b, (..., Y)."""

    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"], train: bool = False) -> Float[Array, "*N Y"]:
        dense = nn.Dense(self.outputs, kernel_init=truncated_normal())
        nn.share_scope(self, dense)  # head/kernel, not head/Dense_0/kernel
        return dense(x.astype(jnp.float32))
