"""The router's rule "capacity" (Mixture-of-Depths; Raposo et al. 2024, arXiv 2404.02258): a fixed number of elements.

In training the ceil(capacity n) elements of a sequence with the largest margins are active, of its n valid ones. That
looks ahead: a later element may take the place of an earlier one. In evaluation and streams an element is active iff
its margin is positive, which depends on it alone. A term of the loss, the cross-entropy of sigmoid(margin) to who was
active, makes the two agree. The confidence is sigmoid(margin). Every layer is routed, not every other one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def largest(margin: Float[Array, "B L M"], valid: Bool[Array, "B L"], capacity: float) -> Bool[Array, "B L M"]:
    """Which elements are among the ceil(capacity n) of their sequence with the largest margins; of equal ones, the
    first."""
    # By a table, rounded: float32 would make 4 of the 3 that 0.1 of 30 are.
    quota = np.ceil(np.round(capacity * np.arange(margin.shape[1] + 1), 6)).astype(np.int32)
    order = jnp.argsort(jnp.where(valid[..., None], -margin, jnp.inf), axis=1)
    rank = jnp.argsort(order, axis=1)
    return (rank < jnp.asarray(quota)[valid.sum(1)][:, None, None]) & valid[..., None]


def disagreement(
    margin: Float[Array, "B L M"], active: Bool[Array, "B L M"], valid: Bool[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The cross-entropy of sigmoid(margin) to `active` in nats, summed over valid elements and modules, whose number is
    returned too."""
    loss = jax.nn.softplus(margin) - jnp.where(active, margin, 0)
    return jnp.where(valid[..., None], loss, 0).sum(), valid.sum() * jnp.float32(margin.shape[2])
