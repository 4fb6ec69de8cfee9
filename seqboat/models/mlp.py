"""A multilayer perceptron: the small target of experiments with hypernetworks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqboat.choices import check_choices, given
from seqboat.layers.initializers import CRITICAL, DeepInitializer, deep
from seqboat.layers.router import no_decisions
from seqboat.layers.selu import AlphaDropout
from seqboat.models.classifier import Output

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "tanh": jnp.tanh,
    "selu": nn.selu,
}


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Widths of the hidden layers, and the number of classes Y. `initializer` is that of the hidden layers
    (`layers.initializers.deep`); self-normalizing networks are activation="selu" with "lecun". `dropout` follows every
    activation, selu by `layers.selu.AlphaDropout`."""

    classes: int = given()
    hidden: tuple[int, ...] = (32, 32)
    activation: Literal["relu", "gelu", "tanh", "selu"] = "relu"
    initializer: DeepInitializer = "he"
    dropout: float = 0.0

    def __post_init__(self):
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden}: must be one or more widths of at least 1")
        check_choices(self)
        if self.initializer == "critical" and self.activation not in CRITICAL:
            raise ValueError(
                f"initializer='critical': {self.activation} takes 'lecun', with which it has a fixed point"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")


class MLP(nn.Module):
    """inputs (B, L, F) of numbers, flattened -> `Output` with logits (B, Y), by dense layers, each with an activation;
    `lengths` are ignored."""

    config: MLPConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "B L F"], lengths: Int[Array, "B"], train: bool = False) -> Output:
        config = self.config
        batch, length, width = inputs.shape
        if not length * width:
            raise ValueError(f"inputs {inputs.shape}: an MLP needs at least one number per example")
        x = inputs.reshape(batch, length * width)
        kernel, bias = deep(config.initializer, config.activation)
        dropout = (AlphaDropout if config.activation == "selu" else nn.Dropout)(config.dropout)
        for index, width in enumerate(config.hidden):
            x = nn.Dense(width, kernel_init=kernel, bias_init=bias, name=f"hidden_{index}")(x)
            x = dropout(ACTIVATIONS[config.activation](x), deterministic=not train)
        stats = no_decisions(jnp.full(1, float(inputs.shape[0] * inputs.shape[1])))
        return Output(nn.Dense(config.classes, name="head")(x), stats)


Config, Model = MLPConfig, MLP
