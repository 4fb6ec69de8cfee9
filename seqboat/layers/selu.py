"""Self-normalizing networks (Klambauer et al. 2017, arXiv 1706.02515): dropout for selu.

With weights of variance 1 / width (LeCun) selu pulls the mean and variance of activations to 0 and 1, layer by layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The limit of selu(x) for x -> -infinity, -lambda alpha.
LOWEST = -1.0507009873554805 * 1.6732632423543772


class AlphaDropout(nn.Module):
    """Activations of selu are set to its limit `LOWEST` at probability 1 - q = `rate`, then become a x + b, with

        a = (q + q (1 - q) LOWEST^2)^(-1/2),    b = -a (1 - q) LOWEST,

    so that a mean of 0 and a variance of 1 stay. Draws from the RNG "dropout".
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], deterministic: bool) -> Float[Array, "*shape"]:
        if deterministic or not self.rate:
            return x
        keep = 1 - self.rate
        scale = (keep + keep * self.rate * LOWEST**2) ** -0.5
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return scale * (jnp.where(kept, x, LOWEST) - self.rate * LOWEST).astype(x.dtype)
