"""A position-wise feed-forward network: a row-wise module for sparse activation."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.layers.initializers import truncated_normal
from seqboat.layers.taps import tap


class FeedForward(nn.Module):
    """Rows (T, D) -> silu(x W_1 + b_1) W_2 + b_2, (T, D). Hidden dropout if a "dropout" RNG is given."""

    hidden_size: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        hidden = nn.silu(nn.Dense(self.hidden_size, dtype=self.dtype, kernel_init=truncated_normal(), name="up")(x))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not self.has_rng("dropout"))
        hidden = tap(self, "feed_forward_hidden", hidden)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=truncated_normal(), name="down")(hidden)
        return tap(self, "feed_forward_out", y)
