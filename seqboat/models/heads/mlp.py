"""A multilayer perceptron of one hidden layer, as in the recipes for Long Range Arena."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.models.head import Head, HeadConfig


@dataclasses.dataclass(frozen=True)
class Config(HeadConfig):
    """`size` is the hidden width, by default 2D."""

    size: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        if self.size is not None and self.size < 1:
            raise ValueError(f"size={self.size}: must be at least 1, or None for twice the width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")

    def make(self, features: int, outputs: int, **owner: Any) -> Head:
        # The name is left to its last layer, which has it in the parameters.
        return Perceptron(self.size or 2 * features, outputs, self.dropout, **{**owner, "name": None})


class Perceptron(Head):
    """x (..., D) -> GELU(dropout(x W + b)) U, (..., Y).

    W is the model's `head_hidden/kernel`, U its `head/kernel`: parameters are in the scope of the owner.
    """

    size: int
    outputs: int
    dropout: float

    def setup(self):
        if isinstance(self.parent, nn.Module):
            nn.share_scope(self.parent, self)
        xavier = nn.initializers.xavier_uniform()
        self.hidden = nn.Dense(self.size, kernel_init=xavier, name="head_hidden")
        self.drop = nn.Dropout(self.dropout, name="Dropout_1")  # the name decides the masks: it is that of old runs
        self.out = nn.Dense(self.outputs, kernel_init=xavier, use_bias=False, name="head")

    def __call__(self, x: Float[Array, "*N D"], train: bool = False) -> Float[Array, "*N Y"]:
        hidden = self.drop(self.hidden(x.astype(jnp.float32)), deterministic=not train)
        return self.out(nn.gelu(hidden, approximate=False))
