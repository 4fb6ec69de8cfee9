"""A multilayer perceptron: the small target of experiments with hypernetworks."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqboat.choices import given
from seqboat.layers.router import no_decisions
from seqboat.models.classifier import Output


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Widths of the hidden layers, and the number of classes Y."""

    classes: int = given()
    hidden: tuple[int, ...] = (32, 32)

    def __post_init__(self):
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden}: must be one or more widths of at least 1")


class MLP(nn.Module):
    """inputs (B, L, F) of numbers, flattened -> `Output` with logits (B, Y), by ReLU layers; `lengths` are ignored."""

    config: MLPConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "B L F"], lengths: Int[Array, "B"], train: bool = False) -> Output:
        batch, length, width = inputs.shape
        if not length * width:
            raise ValueError(f"inputs {inputs.shape}: an MLP needs at least one number per example")
        x = inputs.reshape(batch, length * width)
        for index, width in enumerate(self.config.hidden):
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"hidden_{index}")(x))
        return Output(nn.Dense(self.config.classes, name="head")(x), no_decisions(jnp.full(1, float(batch * length))))


Config, Model = MLPConfig, MLP
