"""The mixer of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a recurrence whose decays and inputs depend on the data."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.mixer import Mixer, MixerConfig
from seqboat.layers.mixers import _directions as directions
from seqboat.ops import mamba2
from seqboat.parallel.rules import Layout

# Initial steps are log-uniform and decay rates uniform in these ranges, as published.
SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1
SLOWEST_DECAY, FASTEST_DECAY = 1.0, 16.0


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """I = `expand` D inner channels, in heads of `head_size` P channels with `state_size` N values each; a causal
    convolution of `convolution` elements in front; `chunk_size` elements are multiplied at once."""

    expand: int = 2
    head_size: int = 32
    state_size: int = 16
    convolution: int = 4
    chunk_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name in ("expand", "convolution"):
            if not 1 <= getattr(self, name) <= 1024:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 to 1024")

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "SSD":
        return SSD(self, causal, **owner)

    def heads(self, features: int) -> int:
        return self.expand * features // self.head_size

    def width_refusal(self, features: int) -> str | None:
        if not self.expand * features % self.head_size:
            return None
        return f"head_size={self.head_size}: must divide expand * features = {self.expand * features}"

    def describe(self, length: int) -> str:
        return f"ssd in chunks of {min(self.chunk_size, length)}"

    def multiplications(self, features: int, causal: bool) -> int:
        inner, states = self.expand * features, self.state_size
        dense = features * (3 * inner + 2 * states + self.heads(features)) + self.convolution * (inner + 2 * states)
        return (1 if causal else 2) * (dense + self.chunk_size * (inner + states) + 2 * inner * states)


class SSD(Mixer):
    """x (B, L, D) -> `ops.mamba2`, of complete sequences or of pieces of streams.

    Dense and convolutional weights start uniform to +-1/sqrt(inputs), d and the norm's scale at 1.
    """

    config: Config
    causal: bool

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> mamba2.State:
        """The state of B streams at their start; `row` (1, D) is an example of the input."""
        config, heads = self.config, self.config.heads(row.shape[1])
        return mamba2.initial_state(batch, heads, config.head_size, config.state_size, config.convolution)

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: mamba2.State | None
    ) -> tuple[Float[Array, "B L D"], mamba2.State | None]:
        config, width, heads = self.config, x.shape[-1], self.config.heads(x.shape[-1])
        inner, taps = config.expand * width, config.convolution
        channels = inner + 2 * config.state_size

        def uniform(inputs):
            limit = 1 / math.sqrt(inputs)
            return lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)

        def dt_bias(key, shape):
            low, high = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
            dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
            return dt + jnp.log(-jnp.expm1(-dt))  # of which softplus is dt

        def a_log(key, shape):
            return jnp.log(jax.random.uniform(key, shape, minval=SLOWEST_DECAY, maxval=FASTEST_DECAY))

        draw = lambda *args: directions.parameter(self, *args)
        params = mamba2.Mamba2Params(
            draw("in_projection", uniform(width), (width, inner + channels + heads)),
            draw("convolution", uniform(taps), (taps, channels)),
            draw("convolution_bias", uniform(taps), (channels,)),
            draw("dt_bias", dt_bias, (heads,)),
            draw("a_log", a_log, (heads,)),
            draw("d", nn.initializers.ones, (heads,)),
            draw("norm_scale", nn.initializers.ones, (inner,)),
            draw("out_projection", uniform(inner), (inner, width)),
        )
        return directions.run(self._run, params, x, valid, state, self.causal)

    @nn.nowrap
    def _run(
        self, params: mamba2.Mamba2Params, x: Array, valid: Array, state: mamba2.State | None, reverse: bool
    ) -> tuple[Array, mamba2.State]:
        if state is None:
            state = self.initial_state(len(x), jax.ShapeDtypeStruct((1, x.shape[2]), x.dtype))
        if reverse:  # padding, which now comes first, leaves the state at zero
            x, valid = x[:, ::-1], valid[:, ::-1]
        y, after = mamba2.advance(params, x, valid, state, self.config.chunk_size)
        return y[:, ::-1] if reverse else y, after
