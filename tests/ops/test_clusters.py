"""Softmax within clusters against a loop in float64, and clusters that cannot be."""

import jax
import numpy as np
import pytest

from seqboat.ops.clusters import check_clusters, join, log_softmax_within, members
from tests.helpers import assert_close, normal

CLUSTERS = (2, 0, 1, 2, 2, 0)


def test_members_are_in_order_and_filled():
    assert members(CLUSTERS).tolist() == [[1, 5, -1], [2, -1, -1], [0, 3, 4]]


def test_log_softmax_within_and_its_gradient_are_those_of_a_loop():
    """Scores far apart: a sum over all symbols at once would lose those of the small clusters."""
    scores, weights = normal(0, 2, 3, 6).at[..., 1].add(-200).at[..., 5].add(-200), normal(1, 2, 3, 6)
    objective = lambda scores: (weights * log_softmax_within(scores, CLUSTERS)).sum()
    got, gradient = jax.jit(lambda s: (log_softmax_within(s, CLUSTERS), jax.grad(objective)(s)))(scores)
    s, w = np.asarray(scores, np.float64), np.asarray(weights, np.float64)
    expected, slope = np.zeros_like(s), np.zeros_like(s)
    for group in ([1, 5], [2], [0, 3, 4]):
        own = s[..., group] - s[..., group].max(-1, keepdims=True)
        expected[..., group] = own - np.log(np.exp(own).sum(-1, keepdims=True))
        share = np.exp(expected[..., group])
        slope[..., group] = w[..., group] - share * w[..., group].sum(-1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_allclose(gradient, slope, atol=2e-5)


# tests/models/test_heads.py: a_factored_head_is_a_plain_one_in_the_limits.
@pytest.mark.breadth
@pytest.mark.parametrize(
    ("clusters", "plain"), [((0,) * 6, 1), (tuple(range(6)), 0)], ids=["one cluster", "one per symbol"]
)
def test_in_the_limits_a_joint_distribution_is_a_plain_softmax(clusters, plain):
    pair = (normal(0, 4, max(clusters) + 1), normal(1, 4, 6))
    got, expected = jax.jit(lambda pair: (join(*pair, clusters), jax.nn.log_softmax(pair[plain])))(pair)
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("clusters", "size", "message"),
    [
        ((0, 1), 3, "clusters: must be one for each of the 3 symbols, not 2"),
        ((0, 2), 2, r"clusters: must be numbered from 0 without gaps, not 0\.\.2 of which 2 have symbols"),
        ((-1, 0), 2, "clusters: must be numbered from 0"),
        ((), 0, "clusters: must be one for each of at least 1 symbol"),
    ],
)
def test_clusters_that_cannot_be(clusters, size, message):
    with pytest.raises(ValueError, match=message):
        check_clusters(clusters, size)
