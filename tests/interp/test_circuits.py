"""Circuits from codes: closed values, what fires nowhere, permuted labels, the order of nodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal

from seqboat.interp import circuits
from seqboat.interp.dictionaries import Atoms

POSITIVE = np.arange(8) < 4
# In columns: one code; two that tell the labels apart; a code per example; two that ignore the labels.
CODES = np.array(
    [[7, 0, 0, 0], [7, 0, 1, 1], [7, 0, 2, 0], [7, 0, 3, 1], [7, 5, 4, 0], [7, 5, 5, 1], [7, 5, 6, 0], [7, 5, 7, 1]]
)


def test_scores_have_their_closed_values():
    np.testing.assert_array_equal(circuits.unique(CODES, POSITIVE), [0, 1, 4, 0])
    expected = [0, np.log(2) - 1 / 16, np.log(2) - 7 / 16, -1 / 16]
    np.testing.assert_allclose(circuits.information(CODES, POSITIVE), expected, atol=1e-12)
    # Three of four and one of four: p(c, y) = 3/8, 1/8.
    node = np.array([[0, 0, 0, 1, 0, 1, 1, 1]]).T
    exact = 2 * (3 / 8 * np.log(3 / 2) + 1 / 8 * np.log(1 / 2)) - 1 / 16
    np.testing.assert_allclose(circuits.information(node, POSITIVE), [exact])


def test_pairs_tell_what_neither_node_tells():
    either = np.array([[0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0, 1, 0]]).T  # equal in positive examples only
    np.testing.assert_array_equal(circuits.unique(either, POSITIVE), [0, 0])
    np.testing.assert_array_equal(circuits.pairs(either, POSITIVE), [[0, 2], [2, 0]])
    found = circuits.pairs(CODES, POSITIVE)
    np.testing.assert_array_equal(np.diag(found), circuits.unique(CODES, POSITIVE))
    np.testing.assert_array_equal(found, found.T)


def planted(seed: int, shifted: bool):
    """Codes and contributions of 24 nodes, of which the first 4 have other codes, and of many, in positive examples."""
    rng = np.random.default_rng(seed)
    positive = np.arange(20) < 10
    codes = rng.integers(2, size=(20, 24))
    codes[:, :4] = 4 * positive[:, None] + rng.integers(3, size=(20, 4))
    sign = 1 if shifted else rng.choice([-1, 1], codes.shape)[..., None]
    return codes, sign * np.eye(8)[codes] + rng.normal(scale=0.1, size=(20, 24, 8)), positive


TRUTH = np.arange(24) < 4


def test_planted_nodes_are_found_and_permuted_labels_find_nothing():
    key, chance, plain = jax.random.key(0), [], []
    for seed in range(16):
        codes, _, positive = planted(seed, shifted=False)
        for score in (circuits.unique, circuits.information):
            assert circuits.auc(score(codes, positive), TRUTH) > 0.97
        of = functools.partial(circuits.debiased, circuits.unique, codes, key=key, permutations=20)
        assert circuits.auc(of(positive), TRUTH) > 0.97
        wrong = np.random.default_rng(seed).permutation(positive)
        chance.append(circuits.auc(of(wrong), TRUTH))
        plain.append(circuits.auc(circuits.unique(codes, wrong), TRUTH))
    assert abs(np.mean(chance) - 0.5) < 0.1
    assert np.mean(plain) > 0.6, "many codes, more of them in positives only by chance"


def test_means_tell_a_shift_only():
    found = {}
    for shifted in (True, False):
        each = [planted(seed, shifted) for seed in range(10)]
        found[shifted] = np.mean([circuits.auc(circuits.mean_difference(x, y), TRUTH) for _, x, y in each])
    assert found[True] > 0.95
    assert found[False] < 0.7


def test_the_order_of_nodes_does_not_matter():
    codes, x, positive = planted(0, True)
    order, key = np.random.default_rng(1).permutation(24), jax.random.key(1)
    debiased = functools.partial(circuits.debiased, circuits.information)
    for score in (circuits.unique, circuits.information, lambda *of: debiased(*of, key)):
        np.testing.assert_array_equal(score(codes, positive)[order], score(codes[:, order], positive))
    np.testing.assert_array_equal(
        circuits.pairs(codes, positive)[np.ix_(order, order)], circuits.pairs(codes[:, order], positive)
    )
    moved = circuits.mean_difference(x[:, order], positive)
    np.testing.assert_allclose(circuits.mean_difference(x, positive)[order], moved, rtol=1e-12)


@pytest.mark.breadth  # test_contributions_sum_to_the_mean_output
def test_a_node_that_adds_nothing_has_the_extra_code():
    # A bias that makes feature 0 fire at zero, and a feature that nothing reaches.
    eye, bias = jnp.eye(3), jnp.array([0.5, 0.0, -9.0])
    atoms = Atoms(eye, bias, eye, jnp.zeros(3), jnp.zeros(3), jnp.zeros(()), "relu")
    x = jnp.array([[[0.0, 0, 0], [0, 2, 0]], [[-1, 0, 3], [1, 1, 0]]])
    assert float(atoms.encode(x[:, :1])[0, 0, 0]) > 0
    assert circuits.node_codes(atoms, x).tolist() == [[3, 1], [3, 0]]


def test_contributions_sum_to_the_mean_output():
    gated, kernel, weights = normal(0, 2, 5, 6), normal(1, 6, 4), jnp.abs(normal(2, 2, 5))
    found = circuits.contributions(gated, kernel, weights, 3)
    assert found.shape == (2, 3, 4)
    assert_close(found.sum(1), jnp.einsum("nld,nl->nd", gated @ kernel, weights))
    second = jnp.einsum("nld,nl->nd", gated[..., 2:4] @ kernel[2:4], weights)
    assert_close(found[:, 1], second)
    with pytest.raises(ValueError, match=r"^contributions: 6 channels do not make 4 groups of one size$"):
        circuits.contributions(gated, kernel, weights, 4)


def test_the_area_of_a_score():
    truth = np.arange(5) < 2
    assert circuits.auc(np.array([3.0, 1, 2, 0, 1]), truth) == 4.5 / 6
    assert circuits.auc(np.zeros(5), truth) == 0.5
    for truth in (np.zeros(5, bool), np.ones(5, bool)):
        with pytest.raises(ValueError, match=r"^auc: [05] of 5 nodes are true; there must be some of both kinds$"):
            circuits.auc(np.zeros(5), truth)


@pytest.mark.breadth
def test_the_area_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")  # takes seconds to import
    rng = np.random.default_rng(0)
    for _ in range(5):
        score, truth = rng.integers(6, size=30) / 2, rng.random(30) < 0.3
        assert circuits.auc(score, truth) == pytest.approx(metrics.roc_auc_score(truth, score), abs=1e-12)


@pytest.mark.parametrize("score", [circuits.unique, circuits.information, circuits.pairs])
def test_both_kinds_of_examples_are_needed(score):
    for positive in (np.zeros(8, bool), np.ones(8, bool)):
        with pytest.raises(ValueError, match=r"^circuits: [08] of 8 examples are positive; both kinds are needed$"):
            score(CODES, positive)
