"""A block of attention from one set of elements to another, and a feed-forward network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.feed_forward import FeedForward
from seqboat.layers.initializers import truncated_normal
from seqboat.layers.norm import LayerNorm


class CrossAttention(nn.Module):
    """x (B, T, D) and what it attends to, (B, S, D), of which `valid` (B, S) counts -> (B, T, D):

        y = x + attend(norm(queries), norm(keys), norm(values));   y + W_2 silu(W_1 norm(y)), of width 4 D

    Softmax attention of `heads` heads. Queries, keys and values are given apart, since positions may be added to some
    of them alone. Self-attention has x four times. Where nothing is valid y is anything finite.
    """

    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        queries: Float[Array, "B T D"],
        keys: Float[Array, "B S D"],
        values: Float[Array, "B S D"],
        valid: Bool[Array, "B S"],
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = lambda name, y: LayerNorm(name=f"{name}_norm")(y, jnp.ones(y.shape[:2], bool), train)
        dense = lambda name, y: nn.Dense(width, kernel_init=truncated_normal(), name=name)(y)
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        q, k, v = (
            split(dense(name, norm(name, y))) for name, y in (("query", queries), ("key", keys), ("value", values))
        )
        attended = jax.nn.dot_product_attention(q, k, v, mask=valid[:, None, None])
        x = x + drop(dense("output", attended.reshape(x.shape)))
        rows = norm("feed_forward", x).reshape(-1, width)
        return x + drop(FeedForward(4 * width, self.dropout, name="feed_forward")(rows).reshape(x.shape))
