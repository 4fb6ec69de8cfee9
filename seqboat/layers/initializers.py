"""Initialisers: of the published model, in which everything is a normal cut at two standard deviations, and of deep
networks of dense layers."""

from typing import Literal

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


DeepInitializer = Literal["he", "lecun", "critical"]
# C_W and C_b of the critical initialisation, to 5 decimals: `seqboat.analysis.criticality` finds them, and a test
# compares. Of selu there is none with signals that stay: it has its own fixed point with "lecun".
CRITICAL = {"relu": (2.0, 0.0), "tanh": (1.0, 0.0), "gelu": (1.98306, 0.17292)}


def deep(initializer: DeepInitializer, activation: str):
    """Initialisers of the kernel and the bias of a dense layer before `activation`: kernels of variance C_W / inputs,
    and biases of variance C_b. "he" has C_W = 2, "lecun" 1, both C_b = 0; those of "critical" keep the activation's
    signals and their differences (Roberts et al. 2021, arXiv 2106.10165)."""
    plain = {"he": (2.0, 0.0), "lecun": (1.0, 0.0)}
    weight, bias = CRITICAL[activation] if initializer == "critical" else plain[initializer]
    kernel = jax.nn.initializers.variance_scaling(weight, "fan_in", "truncated_normal")
    return kernel, jax.nn.initializers.normal(bias**0.5) if bias else jax.nn.initializers.zeros
