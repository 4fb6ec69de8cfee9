"""The HyperZZW operator in one dimension (arXiv 2401.17948): a convolution whose kernel is a network of the lag, times
the inputs themselves.

The released code differs: its global operator has no product with the inputs and multiplies square maps, its local
kernel depends on the mean over the batch, and its `scales` are never trained.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.mixer import Mixer, MixerConfig, check_size
from seqboat.layers.mixers import _directions as directions
from seqboat.ops.convolution import fft_convolve
from seqboat.parallel.rules import Layout

# Added to the mean square of an element's channels, of which there may be none but zeros.
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    """The kernel has `kernel_size` K lags, at coordinates from -1 to 1; it is made by a slow network of `slow_layers`
    hidden layers of width `slow_width`, whose sines turn up to about 6 `frequency` times from lag 0 to K. Without
    `context` the kernel is that of the lag alone, the same for all inputs: a control."""

    kernel_size: int = 1024
    slow_width: int = 16
    slow_layers: int = 2
    frequency: float = 10.0
    context: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_size("slow_width", self.slow_width)
        check_size("slow_layers", self.slow_layers)
        if not self.frequency > 0:
            raise ValueError(f"frequency={self.frequency}: must be above 0")

    def make(self, causal: bool, layout: Layout, **owner: Any) -> "HyperZZW":
        return HyperZZW(self, causal, **owner)

    def stream_refusal(self) -> str:
        return f"name={self.name!r} cannot be streamed: an input weights all later ones, so the state would grow"

    def multiplications(self, features: int, causal: bool) -> int:
        slow = self.slow_width * (self.slow_layers * self.slow_width + features)
        return (1 if causal else 2) * (slow + 3 * features)


class Params(NamedTuple):
    """Of the slow network of one direction, with S hidden layers of width W: `scales` (S + 1, W), `hidden` (S, W, W),
    `bias` (S, W) and `out` (W, D)."""

    scales: Array
    hidden: Array
    bias: Array
    out: Array


def slow_kernel(params: Params, config: Config, lags: int) -> Float[Array, "lags D"]:
    """k_l of the first `lags` lags, with c = -1 + 2 l / (K - 1) and the filters of Romero et al. (2022, MAGNets):

    g_0 = sin(s_0 c),    g_{i+1} = sin(s_{i+1} c) (g_i W_i + b_i),    k = g W_o K^(-1/2)
    """
    c = (jnp.arange(lags) * (2 / max(config.kernel_size - 1, 1)) - 1)[:, None]
    wave = jnp.sin(c[None] * params.scales[:, None])
    g = wave[0]
    for i in range(config.slow_layers):
        g = wave[i + 1] * (g @ params.hidden[i] + params.bias[i][None])
    return g @ params.out * config.kernel_size**-0.5


class HyperZZW(Mixer):
    """x (B, L, D) -> y_t = sum over l <= t of w_l z_{t-l},  w_l = k_l z_l,  for l < K; without context w_l = k_l.

    z is x divided by the root mean square of its channels, in both factors, and zero where not valid. k_l is the
    kernel of `slow_kernel`. y is quadratic in z, and not equivariant to shifts: l is both a lag and a position. At the
    start the scales s_i are 2 pi `frequency` times Gamma(6 / (i + 1)) distributed, W_i and W_o LeCun normal, b_i = 1.
    """

    config: Config
    causal: bool

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: None
    ) -> tuple[Float[Array, "B L D"], None]:
        config, size = self.config, self.config.slow_width

        def scales(key, shape):
            shapes = 6 / jnp.arange(1, shape[0] + 1)
            return 2 * jnp.pi * config.frequency * jax.random.gamma(key, shapes[:, None], shape)

        draw = lambda *args: directions.parameter(self, *args)
        lecun, ones = nn.initializers.lecun_normal(batch_axis=0), nn.initializers.ones
        params = Params(
            draw("scales", scales, (config.slow_layers + 1, size)),
            draw("hidden", lecun, (config.slow_layers, size, size)),
            draw("bias", ones, (config.slow_layers, size)),
            draw("out", nn.initializers.lecun_normal(), (size, x.shape[-1])),
        )
        return directions.run(self._run, params, x, valid, state, self.causal)

    @nn.nowrap
    def _run(self, params: Params, x: Array, valid: Array, state: None, reverse: bool) -> tuple[Array, None]:
        z = jnp.where(valid[..., None], x, 0).astype(jnp.float32)
        z = z * jax.lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + EPSILON)
        # Back to front within each length.
        order = jnp.where(valid, valid.sum(1)[:, None] - 1 - jnp.arange(x.shape[1])[None], 0)[..., None]
        z = jnp.where(valid[..., None], jnp.take_along_axis(z, order, axis=1), 0) if reverse else z
        kernel = slow_kernel(params, self.config, min(self.config.kernel_size, x.shape[1]))
        if self.config.context:
            weights = z[:, : len(kernel)] * kernel[None]
            y = jax.vmap(lambda z, w: fft_convolve(z[None], w.T)[0])(z, weights)
        else:
            y = fft_convolve(z, kernel.T)
        return (jnp.take_along_axis(y, order, axis=1) if reverse else y), None
