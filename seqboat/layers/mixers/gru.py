"""The gated recurrent unit as a mixer."""

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

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "GRU":
        return GRU(causal, **owner)

    def multiplications(self, features: int, causal: bool) -> int:
        return (1 if causal else 2) * (6 * features + 3) * features


class GRU(Recurrent):
    """h_t = (1 - u) n + u h_{t-1}, y = h, where r, u = sig(x_t W + b + h_{t-1} U) and
    n = tanh(x_t W_n + b_n + r * (h_{t-1} U_n + c)) (Cho et al. 2014, in the form of PyTorch's `nn.GRU`: theirs has r
    inside the product, (r * h_{t-1}) U_n, and no c)."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        gates = {"kernel": (width, 3 * width), "recurrent": (width, 3 * width), "bias": (3 * width,)}
        return {**gates, "recurrent_bias": (width,)}

    def cell(self, params: Params, z: Array, valid: Array, state: Tree, reverse: bool) -> tuple[Array, Tree]:
        return cells.gru(cells.GRUParams(params["recurrent"], params["recurrent_bias"]), z, valid, state, reverse)
