"""S4D as a layer, interchangeable with the EMA, holding the parameters of `ops.s4d`."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from seqboat.ops import s4d

# Initial step sizes are log-uniform in this range (Gu et al. 2022, section 4.1).
SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1


class S4D(nn.Module):
    """x (B, L, D) -> the diagonal state space model's output at every element, plus skip x.

    Initialised as S4D-Lin: A_n = -1/2 + i pi n, C complex normal, dt log-uniform in [1e-3, 1e-1], skip ~ N(0, 1)
    (Gu et al. 2022, arXiv 2206.11893, eq. 9). Elements that are not `valid` enter the convolution as zeros.
    """

    state_size: int
    causal: bool
    truncation: int | None = None

    def __call__(self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.advance(x, valid, None)[0]

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
