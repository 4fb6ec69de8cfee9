"""Elman's recurrent network as a mixer."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from seqboat.layers.mixer import MixerConfig, Tree
from seqboat.layers.mixers._recurrent import Params, Recurrent
from seqboat.ops import cells
from seqboat.parallel.rules import Layout


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """Without `recurrence` U is 0, and an element sees itself alone: the control of what sequence order is worth. The
    state is as wide as the layer."""

    recurrence: bool = True

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "Elman":
        return Elman(causal, self.recurrence, **owner)

    def multiplications(self, features: int, causal: bool) -> int:
        return (1 + self.recurrence) * (1 if causal else 2) * features**2


class Elman(Recurrent):
    """h_t = tanh(x_t W + b + h_{t-1} U), y = h (Elman 1990; PyTorch's `nn.RNN`); U = 0 without `recurrence`."""

    recurrence: bool = True

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        own = {"kernel": (width, width), "bias": (width,)}
        return {**own, "recurrent": (width, width)} if self.recurrence else own

    def cell(self, params: Params, z: Array, valid: Array, state: Tree, reverse: bool) -> tuple[Array, Tree]:
        if not self.recurrence:
            return jnp.tanh(z), state
        return cells.elman(params["recurrent"], z, valid, state, reverse)
