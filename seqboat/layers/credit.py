"""Credit assignment for the router: gradients for inactive elements and for attended keys."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.layers.router import RouterConfig
from seqboat.layers.streaming import WorkingMemory
from seqboat.ops.neighbours import Stretch

# Multiple of the module's halo within which credit sees rows, since computed inactive rows lie between active ones.
CREDIT_HALO_FACTOR = 2


class Gate(NamedTuple):
    """One module's decisions, each (B, L): whether the element is `valid`, whether the module is `active`, the
    `probability` of that, and `chosen`, the confidence if active, else 0."""

    valid: Array
    active: Array
    probability: Array
    chosen: Array


def credit(
    run: Callable[..., tuple],
    memory: WorkingMemory | None,
    stretch: Stretch,
    gate: Gate,
    router: RouterConfig,
    key: Callable[[], Array],
) -> Float[Array, "B L D"]:
    """Zeros whose gradient is the router's credit for what computing each element contributes, or would contribute.

    A random `credit_share` of the inactive elements is computed along with the active ones: the result of such an
    element enters with weight p (`straight_through`), and every computed element is attended as a key with weight
    w = p + stop_gradient(a - p)  (`key_credit`), and takes the slot of another one with w too (`eviction_cost`;
    `ops.window_attention.attend`). The gradient flows only into p, divided by the share for inactive elements, so that
    its expectation is that of a share of 1. With `credit_sequences` below 1 the first sequences of the batch alone are
    computed, and their gradient is divided by their share: batches are in random order.

    `run(stretch, memory=, reach=)` computes the module, without gradient into its parameters. In the packed form
    credit is local: it sees CREDIT_HALO_FACTOR times the window of *computed* rows. If few are active, it misses far
    neighbours and evictions that the exact value, and the dense form, include.
    """
    batch, part = len(gate.valid), math.ceil(len(gate.valid) * router.credit_sequences)
    memory, stretch, gate = jax.tree.map(lambda leaf: leaf[:part], (memory, stretch, gate))
    sampled = gate.valid & ~gate.active
    if not router.straight_through:
        sampled &= False
    elif router.credit_share < 1:
        sampled &= jax.random.bernoulli(key(), router.credit_share, sampled.shape)
    probability = jnp.where(gate.active, 1, 1 / router.credit_share) * gate.probability * (batch / part)
    stretch = stretch._replace(m=jax.lax.stop_gradient(stretch.m), computed=gate.active | sampled)
    if router.key_credit:
        # The attended weight is a, so inactive keys change no value, and receive credit.
        weight = _value_with_gradient_of(gate.active, probability)
        occupancy = weight if router.eviction_cost else None
        stretch = stretch._replace(read=stretch.computed, weight=weight, occupancy=occupancy)
    result, stop = run(stretch, memory=memory, reach=CREDIT_HALO_FACTOR)[0], jax.lax.stop_gradient
    sampled_term = jnp.where(sampled, probability, 0)[..., None] * stop(result)
    term = jnp.where(gate.active[..., None], stop(gate.chosen)[..., None] * result, sampled_term)
    return jnp.pad((term - stop(term)).astype(stretch.m.dtype), ((0, batch - part), (0, 0), (0, 0)))


def _value_with_gradient_of(value: Array, surrogate: Array) -> Array:
    return surrogate + jax.lax.stop_gradient(value.astype(surrogate.dtype) - surrogate)
