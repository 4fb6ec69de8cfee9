"""Initialisers of the published model: everything is a normal cut at two standard deviations."""

import jax
import jax.numpy as jnp
import numpy as np

WEIGHT_DEVIATION = 0.02


def truncated_normal(deviation: float = WEIGHT_DEVIATION):
    """N(0, deviation^2) of the untruncated normal, cut at +-2 deviations."""
    return jax.nn.initializers.truncated_normal(deviation, dtype=jnp.float32)


def alternating(deviation: float = WEIGHT_DEVIATION):
    """The EMA's beta: +1, -1, +1, ... over the last axis, plus `truncated_normal`."""

    def init(key, shape, dtype=jnp.float32):
        signs = np.broadcast_to(1 - 2 * (np.arange(shape[-1]) % 2), shape)
        return truncated_normal(deviation)(key, shape, dtype) + signs

    return init
