"""Centred kernel alignment: the published numbers of the biased form, and the debiased one against its definition."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal

from seqboat.ops.similarity import cka

FIXTURE = Path(__file__).parents[1] / "parity" / "fixtures" / "wide" / "cka.npz"
X, Y = normal(0, 12, 5), normal(1, 12, 7)
BOTH = jax.jit(lambda x, y, valid: (cka(x, y, valid=valid), cka(x, y, debiased=False, valid=valid)))
ALL = jnp.ones(12, bool)


def hsic_1(k, l):
    """Song et al. 2012, theorem 2, as it is written."""
    n = len(k)
    k, l, one = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), np.ones(n)
    inner = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one
    return inner / (n * (n - 3))


def debiased(x, y):
    k, l = (np.asarray(a, np.float64) @ np.asarray(a, np.float64).T for a in (x, y))
    return hsic_1(k, l) / np.sqrt(hsic_1(k, k) * hsic_1(l, l))


@pytest.mark.breadth  # test_the_debiased_form_is_that_of_its_definition_and_ignores_rotation_shift_and_scale
def test_the_biased_form_is_the_published_one():
    with np.load(FIXTURE) as file:
        arrays = {name: file[name] for name in file.files}
    assert_close(cka(jnp.asarray(arrays["x"]), jnp.asarray(arrays["y"]), debiased=False), arrays["cka"])


def test_the_debiased_form_is_that_of_its_definition_and_ignores_rotation_shift_and_scale():
    rotation = np.linalg.qr(np.asarray(normal(2, 5, 5)))[0]
    found, biased = BOTH(X, Y, ALL)
    assert_close(found, debiased(X, Y))
    assert_close(BOTH(3 * X @ rotation + 50, Y, ALL), (found, biased), tolerance=1e-4)
    assert_close(BOTH(X, X, ALL), (np.float32(1), np.float32(1)))


def test_of_independent_rows_only_the_debiased_form_is_near_0():
    """Of 12 rows and 20 features, the mean of 50 draws."""
    x, y = normal(3, 50, 12, 20), normal(4, 50, 12, 20)
    found, biased = jax.jit(jax.vmap(BOTH, in_axes=(0, 0, None)))(x, y, ALL)
    assert abs(float(found.mean())) < 0.05
    assert float(biased.mean()) > 0.5


def test_rows_that_do_not_count_may_hold_anything():
    few = jnp.arange(12) < 9
    changed = jnp.where(few[:, None], X, jnp.nan)
    assert_close(BOTH(changed, Y, few)[0], debiased(X[:9], Y[:9]))


def test_of_rows_without_a_similarity_it_is_0_and_has_gradients():
    """Of three rows, and of equal ones."""
    value = jax.jit(jax.value_and_grad(lambda x, valid: cka(x, Y, valid=valid)))
    for x, valid in ((X, jnp.arange(12) < 3), (jnp.ones_like(X), ALL)):
        assert_close(value(x, valid), (np.float32(0), np.zeros_like(X)))
