"""Cross entropy against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, assert_close, normal

from seqboat.ops.losses import cross_entropy


def numpy_cross_entropy(logits, targets):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, np.asarray(targets)[..., None], -1)[..., 0]


@pytest.mark.parametrize(
    "shape", [pytest.param((1,), marks=pytest.mark.breadth), pytest.param((7,), marks=pytest.mark.breadth), (3, 7)]
)
def test_is_minus_the_log_probability_of_the_target(shape):
    logits, targets = normal(0, *shape, 5), jnp.asarray(np.random.default_rng(1).integers(5, size=shape))
    assert_close(cross_entropy(logits, targets), numpy_cross_entropy(logits, targets))


def test_gradient_is_probability_minus_target():
    logits, targets = normal(0, 7, 5), jnp.arange(7) % 5
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets).sum())(logits)
    exponentials = np.exp(np.asarray(logits, np.float64))
    assert_close(gradient, exponentials / exponentials.sum(1, keepdims=True) - np.eye(5)[targets])


def test_large_logits_stay_finite():
    logits = jnp.array([[3e4, -3e4, 0]])
    assert_close(cross_entropy(logits, jnp.array([1])), np.array([6e4]))


def test_half_precision_logits_are_summed_in_float32():
    logits = jnp.asarray(normal(0, 7, 5), jnp.bfloat16)
    targets = jnp.zeros(7, int)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == jnp.float32
    assert_close(loss, numpy_cross_entropy(logits, targets), BF16)


@pytest.mark.parametrize("target", [5, 100, -6, -1])
def test_a_target_outside_the_classes_gives_nan(target):
    loss = cross_entropy(normal(0, 2, 5), jnp.array([target, 0]))
    assert np.isnan(loss[0])
    assert np.isfinite(loss[1])
