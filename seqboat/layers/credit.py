"""Credit assignment for the router: gradients for inactive elements and for attended keys."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.router import RouterConfig
from seqboat.ops.neighbours import Stretch

# Multiple of the module's halo within which credit sees rows, since computed inactive rows lie between active ones.
CREDIT_HALO_FACTOR = 2


class Gate(NamedTuple):
    """One module's decisions, each (B, L): whether it is `active`, the `probability` of that, and `chosen`, the
    confidence if active, else 0."""

    active: Array
    probability: Array
    chosen: Array


def credit(
    run: Callable[..., tuple],
    stretch: Stretch,
    valid: Bool[Array, "B L"],
    gate: Gate,
    router: RouterConfig,
    key: Callable[[], Array],
) -> Float[Array, "B L D"]:
    """Zeros whose gradient is the router's credit for what computing each element contributes, or would contribute.

    A random `credit_share` of the inactive elements is computed along with the active ones: the result of such an
    element enters with weight p (`straight_through`), and every computed element is attended as a key with weight
    w = p + stop_gradient(a - p)  (`key_credit`), and takes the slot of another one with w too (`eviction_cost`;
    `ops.window_attention.attend`). The gradient flows only into p, divided by the share for inactive elements, so that
    its expectation is that of a share of 1.

    `run(stretch, reach=)` computes the module, without gradient into its parameters. In the packed form credit is
    local: it sees CREDIT_HALO_FACTOR times the window of *computed* rows. If few are active, it misses far neighbours
    and evictions that the exact value, and the dense form, include.
    """
    sampled = valid & ~gate.active
    if not router.straight_through:
        sampled &= False
    elif router.credit_share < 1:
        sampled &= jax.random.bernoulli(key(), router.credit_share, sampled.shape)
    probability = jnp.where(gate.active, 1, 1 / router.credit_share) * gate.probability
    stretch = stretch._replace(m=jax.lax.stop_gradient(stretch.m), computed=gate.active | sampled)
    if router.key_credit:  # inactive keys have weight 0 and receive credit
        weight = _straight_through(gate.active, probability)
        occupancy = weight if router.eviction_cost else None
        stretch = stretch._replace(read=stretch.computed, weight=weight, occupancy=occupancy)
    result, stop = run(stretch, reach=CREDIT_HALO_FACTOR)[0], jax.lax.stop_gradient
    paid = jnp.where(sampled, probability, 0)[..., None] * stop(result)
    worth = jnp.where(gate.active[..., None], stop(gate.chosen)[..., None] * result, paid)
    return (worth - stop(worth)).astype(stretch.m.dtype)


def _straight_through(value: Array, surrogate: Array) -> Array:
    """The value with the gradient of the surrogate."""
    return surrogate + jax.lax.stop_gradient(value.astype(surrogate.dtype) - surrogate)
