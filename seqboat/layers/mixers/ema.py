"""The damped EMA as a layer, holding the parameters of `ops.ema`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from seqboat.layers.initializers import alternating, truncated_normal
from seqboat.layers.mixer import Mixer, MixerConfig, check_size
from seqboat.ops import ema
from seqboat.parallel import sequence
from seqboat.parallel.rules import Layout


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """`state_size` N values per channel; `truncation` ends the kernel after that number of lags, as published recipes
    do; None keeps the whole kernel. `method` is for tests and comparisons."""

    state_size: int = 16
    truncation: int | None = None
    method: ema.Method = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.truncation is not None:
            check_size("truncation", self.truncation, ", or None for no limit")

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "EMA":
        return EMA(self.state_size, causal, self.truncation, self.method, layout.length, **owner)

    def split_refusal(self) -> str | None:
        if self.truncation is None:
            return None
        return f"truncation={self.truncation}: must be None if config.mesh splits sequences"

    def kernel(self, params: Any, length: int) -> tuple[Float[Array, "S K"], Float[Array, "D"]]:
        lags = length if self.truncation is None else min(self.truncation, length)
        return ema.kernel(ema.EMAParams(**params), lags), params["omega"]

    def describe(self, length: int) -> str:
        return f"ema by {ema.choose(self.method, length, self.truncation)}"

    def multiplications(self, features: int, causal: bool) -> int:
        return (ema.ACCELERATOR_CHUNK + 2 * (1 if causal else 2) * self.state_size) * features


class EMA(Mixer):
    """x (B, L, D) -> the damped average of every element's past, and of its future unless causal, plus omega x.

    Elements that are not `valid` enter the average as zeros. `axis` names the mesh axis over which sequences are split,
    if any. Initialisation is that of the published model: delta and alpha ~ N(0, 0.2^2), beta ~ alternating +-1 plus
    N(0, 0.02^2), gamma and omega ~ N(0, 1), truncated at two standard deviations. `advance` resumes from an earlier
    state.
    """

    state_size: int
    causal: bool
    truncation: int | None = None
    method: ema.Method = "auto"
    axis: str | None = None

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> ema.State:
        """The state of B streams at their start; `row` (1, D) is an example of the input."""
        return ema.initial_state(batch, row.shape[1], self.state_size, self.truncation, row.dtype)

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: ema.State | None
    ) -> tuple[Float[Array, "B L D"], ema.State | None]:
        """The average over pieces of streams starting from `state`, if any, and the state after their last valid
        elements."""
        width = x.shape[-1]
        shape = (width if self.causal else 2 * width, self.state_size)
        params = ema.EMAParams(
            delta=self.param("delta", truncated_normal(0.2), shape),
            alpha=self.param("alpha", truncated_normal(0.2), shape),
            beta=self.param("beta", alternating(), shape),
            gamma=self.param("gamma", truncated_normal(1.0), shape),
            omega=self.param("omega", truncated_normal(1.0), (width,)),
        )
        if state is not None:
            state, y = ema.stream(params, state, x, valid.sum(1))
            return y, state
        if self.axis:
            return sequence.convolve(params, x, valid, self.axis, self.method), None
        return ema.convolve(params, x, valid, truncation=self.truncation, method=self.method), None
