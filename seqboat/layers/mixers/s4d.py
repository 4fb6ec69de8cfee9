"""S4D as a layer, interchangeable with the EMA, holding the parameters of `ops.s4d`."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from seqboat.layers.mixer import Mixer, MixerConfig, check_size
from seqboat.ops import s4d
from seqboat.parallel.rules import Layout

# Initial step sizes are log-uniform in this range (Gu et al. 2022, section 4.1).
SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """`state_size` N complex values per channel; `truncation` as in the EMA."""

    state_size: int = 16
    truncation: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.truncation is not None:
            check_size("truncation", self.truncation, ", or None for no limit")

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "S4D":
        return S4D(self.state_size, causal, self.truncation, **owner)

    def stream_refusal(self) -> str | None:
        if self.truncation is None:
            return None
        why = "only the EMA has a state for a truncated kernel; train with None"
        return f"truncation={self.truncation} cannot be streamed: {why}"

    def kernel(self, params: Any, length: int) -> tuple[Float[Array, "S K"], Float[Array, "D"]]:
        lags = length if self.truncation is None else min(self.truncation, length)
        return s4d.kernel(s4d.S4DParams(**params), lags), params["skip"]

    def describe(self, length: int) -> str:
        return "s4d by fft"

    def multiplications(self, features: int, causal: bool) -> int:
        return 4 * (1 if causal else 2) * self.state_size * features


class S4D(Mixer):
    """x (B, L, D) -> the diagonal state space model's output at every element, plus skip x.

    Initialised as S4D-Lin: A_n = -1/2 + i pi n, C complex normal, dt log-uniform in [1e-3, 1e-1], skip ~ N(0, 1)
    (Gu et al. 2022, arXiv 2206.11893, eq. 9). Elements that are not `valid` enter the convolution as zeros.
    """

    state_size: int
    causal: bool
    truncation: int | None = None

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> Complex[Array, "B D N"]:
        """The state of B streams at their start; `row` (1, D) is an example of the input."""
        return jnp.zeros((batch, row.shape[1], self.state_size), jnp.complex64)

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: Complex[Array, "B D N"] | None
    ) -> tuple[Float[Array, "B L D"], Complex[Array, "B D N"] | None]:
        """The output for pieces of streams starting from `state`, if any, and the state after their last valid
        elements."""
        width = x.shape[-1]
        directions = width if self.causal else 2 * width
        shape = (directions, self.state_size)

        def log_step(key, shape):
            return jax.random.uniform(key, shape, minval=math.log(SHORTEST_STEP), maxval=math.log(LONGEST_STEP))

        def lin(key, shape):
            return jnp.broadcast_to(jnp.asarray(np.pi * np.arange(shape[-1]), jnp.float32), shape)

        half_normal = nn.initializers.normal(math.sqrt(0.5))
        params = s4d.S4DParams(
            log_step=self.param("log_step", log_step, (directions,)),
            log_decay=self.param("log_decay", nn.initializers.constant(math.log(0.5)), shape),
            frequency=self.param("frequency", lin, shape),
            c_real=self.param("c_real", half_normal, shape),
            c_imag=self.param("c_imag", half_normal, shape),
            skip=self.param("skip", nn.initializers.normal(1.0), (width,)),
        )
        if state is not None:
            state, y = s4d.stream(params, state, x, valid.sum(1))
            return y, state
        return s4d.convolve(params, x, valid, truncation=self.truncation), None
