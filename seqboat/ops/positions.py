"""Position encodings of attention: a bias per pair of rows, or a rotation of queries and keys.

Every function takes the positions of rows, so that nothing larger than a block of queries by a block of keys is
materialised.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

T5_BUCKETS = 32
T5_MAX_DISTANCE = 128
ROTARY_BASE = 10000.0


def relative_bias(table: Float[Array, "P"], query: Int[Array, "Q"], key: Int[Array, "J"]) -> Float[Array, "Q J"]:
    """table[clip(P' - 1 + key - query, 0, 2P' - 2)] of a table of 2P' - 1 entries: distance in original positions.

    Distances beyond the table use its ends. Its size is the recipe's longest length P'; a block looks up only its own
    pairs.
    """
    center = (table.shape[0] - 1) // 2
    return table[jnp.clip(center + key[None, :] - query[:, None], 0, table.shape[0] - 1)]


def slot_bias(
    table: Float[Array, "P"], query: Int[Array, "Q"], key: Int[Array, "J"], window: int
) -> Float[Array, "Q J"]:
    """table[4w - 1 + (key - query)] of a table of 6w - 1 entries: distance counted in activated elements.

    The offset and the unused entries match the published layer: only 3w - 1 .. 5w - 1 are within the window.
    """
    return table[jnp.clip(4 * window - 1 + key[None, :] - query[:, None], 0, table.shape[0] - 1)]


def t5_bias(
    table: Float[Array, "P"], query: Int[Array, "Q"], key: Int[Array, "J"], causal: bool
) -> Float[Array, "Q J"]:
    """One scalar per bucket of original distance (Raffel et al. 2020, section 2.1)."""
    return table[t5_bucket(key[None, :] - query[:, None], causal, table.shape[0])]


def t5_bucket(distance: Int[Array, "..."], causal: bool, buckets: int = T5_BUCKETS) -> Int[Array, "..."]:
    """Buckets of key - query: the first half exact, then logarithmic to 128, then shared. Two directions get half
    each."""
    if causal:
        offset, distance = jnp.zeros_like(distance), jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        offset, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(T5_MAX_DISTANCE / exact)
    far = exact + (jnp.log(jnp.maximum(distance, 1) / exact) * scale).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def rotate(x: Float[Array, "T Z"], position: Int[Array, "T"]) -> Float[Array, "T Z"]:
    """Rotary embedding (Su et al. 2021): pair (2i, 2i + 1) is rotated by position * 10000^(-2i / Z), in float32.

    Angles are wrap-around integers in units of 2^-32 turns, so that they are equally accurate at any position (a
    float32 angle is off by 0.004 at position 100,000 and by half a radian at 10,000,000), and a pair of rows depends
    only on the difference of its positions, even modulo 2^32. Frequencies are accurate to 2^-33 turns.
    """
    frequencies = ROTARY_BASE ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    turns = np.round(frequencies / (2 * np.pi) * 2**32).astype(np.int32)  # in base turns: at most 0.16 per position
    angle = (position.astype(jnp.int32)[:, None] * turns[None]).astype(jnp.float32) * (np.pi / 2**31)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[:, 0::2].astype(jnp.float32), x[:, 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotary_bias(alpha: Float[Array, "Z"], beta: Float[Array, "Z"], length: int) -> Float[Array, "P"]:
    """<R_m alpha, R_n beta> by the distance n - m of 1 - length..length - 1: a table for `relative_bias`, in float32.

    R_t rotates channels i and Z / 2 + i, the pairs of MEGA's published code, by the angle t 10000^(-2i / Z).
    """
    half = alpha.shape[0] // 2
    frequencies = ROTARY_BASE ** (-np.arange(half) / half)
    angle = np.arange(1 - length, length)[:, None] * frequencies[None]
    cos, sin = (jnp.asarray(turn, jnp.float32) for turn in (np.cos(angle), np.sin(angle)))
    (a, b), (c, d) = (jnp.split(vector.astype(jnp.float32), 2) for vector in (alpha, beta))
    return cos @ (a * c + b * d) + sin @ (b * c - a * d)


def sinusoid(length: int, width: int) -> np.ndarray:
    """(length, width) float32: sin in the first half of the channels and cos in the second, 10000^(-2i / width)."""
    half = (width + 1) // 2
    frequencies = ROTARY_BASE ** (-2 * np.arange(half) / width)
    angle = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)[:, :width].astype(np.float32)
