"""State space duality, the selective recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6).

Every head has a state (P, N), one decay a_t = exp(log_decay_t) <= 1 per element, and reads and writes the vectors c_t
and b_t that all heads share:

    h_t = a_t h_{t-1} + x_t b_t^T,    y_t = h_t c_t.

An element with log_decay = 0 and x = 0 leaves the state as it is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def reference(
    x: Float[Array, "B L H P"],
    log_decay: Float[Array, "B L H"],
    b: Float[Array, "B L N"],
    c: Float[Array, "B L N"],
    state: Float[Array, "B H P N"],
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """y and the last state, one element after the other."""

    def step(h, element):
        x, log_decay, b, c = element
        h = jnp.exp(log_decay)[..., None, None] * h + x[..., None] * b[:, None, None]
        return h, jnp.einsum("bhpn,bn->bhp", h, c)

    after, y = jax.lax.scan(step, state, jax.tree.map(lambda a: a.swapaxes(0, 1), (x, log_decay, b, c)))
    return y.swapaxes(0, 1), after


def chunked(
    x: Float[Array, "B L H P"],
    log_decay: Float[Array, "B L H"],
    b: Float[Array, "B L N"],
    c: Float[Array, "B L N"],
    state: Float[Array, "B H P N"],
    chunk: int,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """`reference` by products within chunks of that many elements, and one scan over the chunks.

    With l_t the sum of log_decay from the start of a chunk to t, and h the state that enters it,

        y_t = sum_{s <= t} exp(l_t - l_s) (c_t . b_s) x_s  +  exp(l_t) h c_t.

    Decays and states are float32, products in the dtype of x, summed in float32; y and the state are float32. A length
    that the chunk does not divide is padded with elements that change nothing.
    """
    batch, length, heads, channels = x.shape
    chunk = max(1, min(chunk, length))
    x, log_decay, b, c = (_in_chunks(a, chunk) for a in (x, log_decay, b, c))
    since = jnp.cumsum(log_decay.astype(jnp.float32), axis=2).transpose(0, 1, 3, 2)  # (B, M, H, C)
    y = _within(x, since, b, c)
    # What each chunk adds to the state, and the state that enters it.
    left = jnp.exp(since[..., -1:] - since).swapaxes(2, 3)[..., None].astype(x.dtype)
    added = _product("bmshp,bmsn->mbhpn", left * x, b)
    decay = jnp.exp(since[..., -1]).swapaxes(0, 1)[..., None, None]
    after, entering = jax.lax.scan(lambda h, chunk: (chunk[0] * h + chunk[1], h), state, (decay, added))
    read = _product("bmtn,mbhpn->bmthp", c, entering.astype(x.dtype))
    y += jnp.exp(since).swapaxes(2, 3)[..., None] * read
    return y.reshape(batch, x.shape[1] * chunk, heads, channels)[:, :length], after


def _in_chunks(a: Float[Array, "B L *rest"], chunk: int) -> Float[Array, "B M C *rest"]:
    """Padded with zeros at the end."""
    count = -(-a.shape[1] // chunk)
    a = jnp.pad(a, [(0, count * chunk - a.shape[1] if axis == 1 else 0) for axis in range(a.ndim)])
    return a.reshape(len(a), count, chunk, *a.shape[2:])


def _within(
    x: Float[Array, "B M C H P"],
    since: Float[Array, "B M H C"],
    b: Float[Array, "B M C N"],
    c: Float[Array, "B M C N"],
) -> Float[Array, "B M C H P"]:
    """What the elements of a chunk give to each other: a masked attention without softmax, with decays."""
    earlier = np.tril(np.ones((x.shape[2], x.shape[2]), bool))
    # Masked before the exponential, which overflows for later elements.
    decay = jnp.exp(jnp.where(earlier, since[..., :, None] - since[..., None, :], -jnp.inf))
    weights = (_product("bmtn,bmsn->bmts", c, b)[:, :, None] * decay).astype(x.dtype)
    return _product("bmhts,bmshp->bmthp", weights, x)
