"""The linear recurrent unit (Orvieto et al. 2023, arXiv 2303.06349): dense products around a diagonal recurrence."""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from seqboat.layers.mixers import _directions as directions
from seqboat.ops import recurrence
from seqboat.parallel.rules import Layout


@dataclasses.dataclass(frozen=True)
class Config(directions.LinearConfig):
    """`state_size` P complex values in all. At the start |lambda| is between `r_min` and `r_max`, and its phase between
    0 and `max_phase`, in radians."""

    r_min: float = 0.4
    r_max: float = 0.99
    max_phase: float = math.pi

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.r_max < 1:
            raise ValueError(f"r_max={self.r_max}: must be above 0 and below 1")
        if not 0 <= self.r_min <= self.r_max:
            raise ValueError(f"r_min={self.r_min}: must be 0 to r_max={self.r_max}")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase={self.max_phase}: must be above 0 and at most 2 pi")

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "LRU":
        return LRU(self, causal, layout.length, **owner)


class Params(NamedTuple):
    """Of one direction: `nu_log`, `theta_log`, `gamma_log` (P,); `b` (D, 2, P) and `c` (2, P, D), real and imaginary;
    `d` (D,)."""

    nu_log: Array
    theta_log: Array
    gamma_log: Array
    b: Array
    c: Array
    d: Array


class LRU(directions.Linear):
    """x (B, L, D) -> y_t = Re(h_t C) + d x_t,  h_t = lambda h_{t-1} + exp(gamma_log) x_t B,  with
    lambda = exp(-exp(nu_log) + i exp(theta_log)).

    At the start lambda is uniform in the ring's area, the phase uniform, and exp(gamma_log) = sqrt(1 - |lambda|^2), so
    that states of white noise have the variance of x B. B and C are complex normal of variance 1/D and 2/P, d ~
    N(0, 1).
    """

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: Complex[Array, "B P"] | None
    ) -> tuple[Float[Array, "B L D"], Complex[Array, "B P"] | None]:
        config, width = self.config, x.shape[-1]
        inner, outer = config.r_min**2, config.r_max**2

        def nu_log(key, shape):
            # Not from 0, whose log is infinite.
            squared = jax.random.uniform(key, shape, minval=max(inner, 1e-12 * outer), maxval=outer)
            return jnp.log(-0.5 * jnp.log(squared))

        def theta_log(key, shape):
            return jnp.log(jax.random.uniform(key, shape, minval=1e-6, maxval=1.0) * config.max_phase)

        draw = lambda *args: directions.parameter(self, *args)
        normal, size = nn.initializers.normal, config.state_size
        nu = draw("nu_log", nu_log, (size,))
        params = Params(
            nu,
            draw("theta_log", theta_log, (size,)),
            self.param("gamma_log", lambda _: 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu)))),
            draw("b", normal(math.sqrt(0.5 / width)), (width, 2, size)),
            draw("c", normal(math.sqrt(1 / size)), (2, size, width)),
            draw("d", normal(1.0), (width,)),
        )
        return directions.run(self._run, params, x, valid, state, self.causal)

    @nn.nowrap
    def _run(self, params: Params, x: Array, valid: Array, state: Array | None, reverse: bool) -> tuple[Array, Any]:
        decay = jnp.exp(jax.lax.complex(-jnp.exp(params.nu_log), jnp.exp(params.theta_log)))
        z = recurrence.into(x, params.b * jnp.exp(params.gamma_log)[None, None])
        h, after = directions.linear(decay, z, valid, state, reverse, self.axis)
        return recurrence.out_of(h, params.c, x.dtype) + params.d[None, None] * x, after
