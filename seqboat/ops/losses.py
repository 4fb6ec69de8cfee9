"""Losses with one value per example or element; callers keep sums and weights separate until the very end."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "*B Y"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[target] in nats, computed in float32.

    A target outside 0..Y-1 gives NaN rather than a wrong number.
    """
    targets = jnp.where(targets < 0, logits.shape[-1], targets)  # a negative index would count from the end
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    return -picked[..., 0]
