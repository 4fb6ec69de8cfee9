"""The simplified state space layer S5 (Smith et al. 2023, arXiv 2208.04933): one state space for all channels."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from seqboat.layers.mixers import _directions as directions
from seqboat.ops import recurrence, s5
from seqboat.parallel.rules import Layout


@dataclasses.dataclass(frozen=True)
class Config(directions.LinearConfig):
    """`state_size` P complex values in all, each with its conjugate. The initial dt, one for each state, is log-uniform
    from `shortest_step` to `longest_step`."""

    shortest_step: float = 1e-3
    longest_step: float = 1e-1
    discretization: s5.Discretization = "zoh"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.shortest_step <= self.longest_step < math.inf:
            raise ValueError(
                f"shortest_step={self.shortest_step}: must be above 0 and at most longest_step={self.longest_step}"
            )

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "S5":
        return S5(self, causal, layout.length, **owner)


class S5(directions.Linear):
    """x (B, L, D) -> y_t = 2 Re(h_t C) + d x_t,  h_t = A' h_{t-1} + x_t B',  with A', B' of `ops.s5.discretize`.

    A starts as `ops.s5.legs`, with eigenvectors V; B = V^-1 B_0 and C = C_0 V, with B_0, Re C_0 and Im C_0 normal of
    variance 1/2P. A stays in the left half-plane, which the published parameters, Re A itself, may leave.
    """

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: Complex[Array, "B P"] | None
    ) -> tuple[Float[Array, "B L D"], Complex[Array, "B P"] | None]:
        config, size, width = self.config, self.config.state_size, x.shape[-1]
        a, vectors = s5.legs(size)
        parts = jnp.asarray([vectors.real, vectors.imag], jnp.float32)
        normal = nn.initializers.normal(math.sqrt(0.5 / size))

        def b(key, shape):
            return jnp.einsum("nd,rnp->drp", normal(key, (2 * size, width)), parts * np.asarray([1, -1])[:, None, None])

        def c(key, shape):
            real, imag = normal(key, (2, width, 2 * size))
            product = (real + 1j * imag) @ vectors.astype(np.complex64)
            return jnp.stack([product.real.T, product.imag.T])

        def dt_log(key, shape):
            low, high = math.log(config.shortest_step), math.log(config.longest_step)
            return jax.random.uniform(key, shape, minval=low, maxval=high)

        draw = lambda *args: directions.parameter(self, *args)
        params = s5.S5Params(
            draw("a_real_log", nn.initializers.constant(math.log(0.5)), (size,)),
            draw("a_imag", lambda key, shape: jnp.asarray(a.imag, jnp.float32), (size,)),
            draw("dt_log", dt_log, (size,)),
            draw("b", b, (width, 2, size)),
            draw("c", c, (2, size, width)),
            draw("d", nn.initializers.normal(1.0), (width,)),
        )
        return directions.run(self._run, params, x, valid, state, self.causal)

    @nn.nowrap
    def _run(
        self, params: s5.S5Params, x: Array, valid: Array, state: Array | None, reverse: bool
    ) -> tuple[Array, Any]:
        decay, weight = s5.discretize(params, self.config.discretization)
        z = weight[None, None] * recurrence.into(x, params.b)
        h, after = directions.linear(decay, z, valid, state, reverse, self.axis)
        return 2 * recurrence.out_of(h, params.c, x.dtype) + params.d[None, None] * x, after
