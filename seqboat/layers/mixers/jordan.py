"""Jordan's recurrent network as a mixer."""

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

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "Jordan":
        return Jordan(causal, **owner)

    def multiplications(self, features: int, causal: bool) -> int:
        return 3 * (1 if causal else 2) * features**2


class Jordan(Recurrent):
    """y_t = tanh(x_t W + b + y_{t-1} U) V + c: the output is fed back, not the hidden state (Jordan 1986)."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        square = {name: (width, width) for name in ("kernel", "recurrent", "output")}
        return {**square, "bias": (width,), "output_bias": (width,)}

    def cell(self, params: Params, z: Array, valid: Array, state: Tree, reverse: bool) -> tuple[Array, Tree]:
        own = cells.JordanParams(params["recurrent"], params["output"], params["output_bias"])
        return cells.jordan(own, z, valid, state, reverse)
