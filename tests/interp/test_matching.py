"""Planted matches are found again, nulls keep what they should, and numbers that others compute."""

import jax
import numpy as np
import pytest

from seqboat.interp import matching

N, P = 400, 12
RNG = np.random.default_rng(0)
UNITS = RNG.standard_normal((N, P)) * np.geomspace(0.1, 10, P) + 5
ORDER = RNG.permutation(P)
COPY = UNITS[:, ORDER] + 0.3 * UNITS.std(0)[ORDER] * RNG.standard_normal((N, P))


def with_constants(a: np.ndarray) -> np.ndarray:
    """Two more units that never change; the variance of 0.1 is not exactly 0."""
    return np.concatenate([a, np.full((len(a), 1), 0.1), np.zeros((len(a), 1))], axis=1)


def test_correlation_is_that_of_numpy_and_0_of_constants():
    found = matching.correlation(with_constants(UNITS), with_constants(COPY))
    expected = np.corrcoef(UNITS.T, COPY.T)[:P, P:]
    np.testing.assert_allclose(found[:P, :P], expected, atol=1e-12)
    assert not found[P:].any()
    assert not found[:, P:].any()


def test_a_permuted_noisy_copy_is_recovered_whatever_the_signs():
    found = matching.one_to_one(matching.correlation(UNITS, COPY))
    np.testing.assert_array_equal(found.rows, np.arange(P))
    np.testing.assert_array_equal(ORDER[found.columns], np.arange(P))
    assert found.values.min() > 0.9
    turned = COPY * RNG.choice([-1.0, 1.0], P)
    signed = matching.correlation(UNITS, turned)
    unsigned = matching.one_to_one(abs(signed))
    np.testing.assert_array_equal(unsigned.columns, found.columns)
    np.testing.assert_allclose(unsigned.values, found.values, atol=1e-12)
    assert matching.one_to_one(signed).values.min() < 0.9, "of opposite units the signed value is the worst"


def test_one_to_one_is_the_best_of_all_and_semi_shares_columns():
    c = np.array([[0.9, 0.8, 0.0], [0.7, 0.1, 0.0]])
    best, shared = matching.one_to_one(c), matching.semi(c)
    assert (best.rows.tolist(), best.columns.tolist(), best.values.tolist()) == ([0, 1], [1, 0], [0.8, 0.7])
    assert (shared.rows.tolist(), shared.columns.tolist(), shared.values.tolist()) == ([0, 1], [0, 0], [0.9, 0.7])
    assert len(matching.one_to_one(c.T).rows) == 2


@pytest.mark.parametrize("penalty", [0.01, 0.2])
def test_sparse_predictions_are_those_of_lasso(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the oracle is scikit-learn's Lasso")
    a = with_constants(UNITS + 0.9 * UNITS[:, ::-1])  # pairs of units that are close to one another
    b = np.stack([a[:, 0] - 2 * a[:, 3], np.tanh(a[:, 5]) + RNG.standard_normal(N), np.full(N, 0.1)], axis=1)
    found = matching.sparse_prediction(a, b, penalty)
    x, y = matching.standardised(a), matching.standardised(b)
    lasso = linear_model.Lasso(penalty, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y)
    np.testing.assert_allclose(found.weights, lasso.coef_.T, atol=1e-5)
    np.testing.assert_array_equal(found.weights != 0, lasso.coef_.T != 0)
    explained = 1 - np.square(y - x @ found.weights).sum(0)[:2] / np.square(y).sum(0)[:2]
    np.testing.assert_allclose(found.r2, [*explained, 0], atol=1e-9)
    assert not matching.sparse_prediction(a, b, 1.0).weights.any()


def test_planted_groups_are_found():
    sources = RNG.standard_normal((N, 3))
    of_a, of_b = np.array([0, 0, 1, 2, 2]), np.array([2, 1, 1, 0])
    mixed = lambda which: sources[:, which] * RNG.choice([-1, 1], len(which)) + RNG.normal(size=(N, len(which))) / 2
    a, b = mixed(of_a), with_constants(mixed(of_b))
    found_a, found_b = matching.groups(a, b, 3)
    names = {tuple(pair) for pair in zip([*of_a, *of_b], [*found_a, *found_b[:4]], strict=True)}
    assert len(names) == 3, "one label for each source"
    assert {label for _, label in names} == {0, 1, 2}
    assert found_b[4:].tolist() == [-1, -1]
    with pytest.raises(ValueError, match="count=10: must be 1 to 9"):
        matching.groups(a, b, 10)


def test_a_rolled_sequence_is_turned_by_multiples_of_the_period():
    lengths = np.array([10, 7, 2, 1, 0, 10, 9, 10])
    b = np.arange(80).reshape(8, 10, 1)
    turned = matching.rolled(b, jax.random.key(1), lengths, period=2)
    offsets = []
    for before, after, length in zip(b[..., 0], turned[..., 0], lengths, strict=True):
        np.testing.assert_array_equal(after[length:], before[length:])
        offset = int(np.flatnonzero(after == before[0])[0])
        np.testing.assert_array_equal(after[:length], np.roll(before[:length], offset))
        offsets.append(offset)
    assert all(offset % 2 == 0 for offset in offsets)
    assert [offset == 0 for offset in offsets] == [False, False, True, True, True, False, False, False]
    assert len(set(offsets)) > 2, "each has its own"
    assert np.any(matching.rolled(b, jax.random.key(2), lengths, period=2) != turned)
    np.testing.assert_array_equal(matching.rolled(b[:, :2], jax.random.key(0)), b[:, [1, 0]])


def test_kappa_in_closed_form():
    a = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    assert matching.kappa(a, a) == 1
    assert matching.kappa(a[:6], ~a[:6]) == pytest.approx(-1)
    # Agreement 5/8, by chance 3/8 2/8 + 5/8 6/8 = 9/16.
    b = np.array([1, 0, 0, 1, 0, 0, 0, 0], bool)
    assert matching.kappa(a, b) == pytest.approx((5 / 8 - 9 / 16) / (1 - 9 / 16))
    independent = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)
    assert matching.kappa(*independent.T) == 0
    constant = [matching.kappa(np.full(8, value), other) for value in (False, True) for other in (a, a | True)]
    assert constant == [0] * 4
