"""Elman's recurrent network as a mixer."""

import dataclasses
from typing import Any

from jaxtyping import Array

from seqboat.layers.mixer import MixerConfig, Tree
from seqboat.layers.mixers._recurrent import Params, Recurrent
from seqboat.ops import cells
from seqboat.parallel.rules import Layout


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """It has no fields: the state is as wide as the layer."""

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "Elman":
        return Elman(causal, **owner)

    def multiplications(self, features: int, causal: bool) -> int:
        return 2 * (1 if causal else 2) * features**2


class Elman(Recurrent):
    """h_t = tanh(x_t W + b + h_{t-1} U), y = h (Elman 1990; PyTorch's `nn.RNN`)."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (width, width), "recurrent": (width, width), "bias": (width,)}

    def cell(self, params: Params, z: Array, valid: Array, state: Tree, reverse: bool) -> tuple[Array, Tree]:
        return cells.elman(params["recurrent"], z, valid, state, reverse)
