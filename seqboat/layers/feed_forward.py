"""A position-wise feed-forward network: a row-wise module for sparse activation."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.layers.initializers import deep, truncated_normal
from seqboat.layers.selu import AlphaDropout
from seqboat.layers.taps import tap

FeedForwardActivation = Literal["silu", "selu"]


class FeedForward(nn.Module):
    """Rows (T, D) -> f(x W_1 + b_1) W_2 + b_2, (T, D), with f silu or selu. Hidden dropout if a "dropout" RNG is given.

    "selu" comes with its own initialiser, N(0, 1 / inputs), and its own dropout (`layers.selu`). `reads` is the name of
    the tap that the rows are of, if there is one, for edits of the result that read them.
    """

    hidden_size: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    activation: FeedForwardActivation = "silu"
    reads: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        own = self.activation == "selu"
        init = deep("lecun", "selu")[0] if own else truncated_normal()
        hidden = nn.Dense(self.hidden_size, dtype=self.dtype, kernel_init=init, name="up")(x)
        hidden = nn.selu(hidden) if own else nn.silu(hidden)
        dropout = (AlphaDropout if own else nn.Dropout)(self.dropout)
        hidden = tap(self, "feed_forward_hidden", dropout(hidden, deterministic=not self.has_rng("dropout")))
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name="down")(hidden)
        read = {} if self.reads is None else {self.reads: x}
        return tap(self, "feed_forward_out", y, {**read, "feed_forward_hidden": hidden})
