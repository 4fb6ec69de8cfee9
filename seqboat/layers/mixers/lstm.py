"""Long short-term memory as a mixer."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from seqboat.layers.mixer import MixerConfig, Tree
from seqboat.layers.mixers._recurrent import Params, Recurrent
from seqboat.ops import cells
from seqboat.parallel.rules import Layout


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """`forget_bias` is added to the forget gate's bias at the start: above 0 the cell starts by remembering. With
    `peepholes` the gates see the cell's state."""

    forget_bias: float = 1.0
    peepholes: bool = False

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "LSTM":
        return LSTM(causal, self.forget_bias, self.peepholes, **owner)

    def multiplications(self, features: int, causal: bool) -> int:
        per_channel = 8 * features + 3 + 3 * self.peepholes
        return (1 if causal else 2) * per_channel * features


class LSTM(Recurrent):
    """c_t = sig(f) c_{t-1} + sig(i) tanh(g), h_t = sig(o) tanh(c_t), y = h, where i, f, g, o = x_t W + b + h_{t-1} U
    (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; PyTorch's `nn.LSTM`).

    With `peepholes` p, i and f also see p * c_{t-1}, and o sees p * c_t (Gers et al. 2002). The state is (c, h).
    """

    forget_bias: float = 1.0
    peepholes: bool = False

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> Tree:
        """(c, h), zeros (B, D), for B streams; `row` (1, D) is an example of the input."""
        zeros = super().initial_state
        return zeros(batch, row), zeros(batch, row)  # two arrays: a program may take each one's memory

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        matrices = {"kernel": (width, 4 * width), "recurrent": (width, 4 * width), "bias": (4 * width,)}
        return {**matrices, "peepholes": (3, width)} if self.peepholes else matrices

    @nn.nowrap
    def adjust(self, name: str, values: Array) -> Array:
        width = values.shape[-1] // 4
        return values.at[..., width : 2 * width].add(self.forget_bias) if name == "bias" else values

    def cell(self, params: Params, z: Array, valid: Array, state: Tree, reverse: bool) -> tuple[Array, Tree]:
        own = cells.LSTMParams(params["recurrent"], params.get("peepholes"))
        return cells.lstm(own, z, valid, state, reverse)
