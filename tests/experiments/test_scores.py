"""Standard errors, and two runs on the same examples: against textbook formulas, scipy and resampling."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.common.errors import UserError
from experiments.evaluation.examples import Scores, _digest, compare, is_example, per_class, standard_error, verdict


def scores(values, weights=None, name="accuracy", digests=None) -> Scores:
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    names = digests or tuple(bytes([i % 256]) for i in range(len(values)))
    return Scores({}, {name: (values, weights)}, names, {})


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_error_of_an_accuracy_is_the_binomials(right):
    p, n = np.mean(right), len(right)
    expected = math.sqrt(p * (1 - p) / (n - 1))
    assert standard_error(np.array(right, float), np.ones(n)) == pytest.approx(expected, abs=1e-12)


def test_the_error_of_a_mean_is_the_samples_and_of_sums_over_windows_that_of_the_ratio():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    assert standard_error(x, np.ones(30)) == pytest.approx(stats.sem(x))
    assert standard_error(7 * x, np.full(30, 7.0)) == pytest.approx(stats.sem(x)), "equal windows of 7 bytes"
    assert standard_error(x[:1], np.ones(1)) is None
    # Windows of unequal numbers of bytes: the deviation of the ratio over many samples of 400 of them.
    weights = rng.integers(1, 20, size=(4000, 400)).astype(float)
    sums = weights * (2 + rng.normal(size=weights.shape))
    found = [standard_error(s, w) for s, w in zip(sums[:50], weights[:50], strict=True)]
    assert np.mean(found) == pytest.approx((sums.sum(1) / weights.sum(1)).std(), rel=0.05)


def test_right_or_wrong_is_compared_by_mcnemars_test():
    here = scores([1] * 10 + [0] * 2 + [1, 0] * 20)
    there = scores([0] * 10 + [1] * 2 + [1, 0] * 20)
    found = compare(here, there)["accuracy"]
    assert (found["right_here_alone"], found["right_there_alone"]) == (10, 2)
    # Two-sided: 2 or fewer, or 10 or more, of 12 throws of a coin.
    assert found["p_value"] == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert found["difference"] == pytest.approx(8 / 52)
    assert verdict("accuracy", found, True, 52).startswith("this run is better in accuracy: 0.5769 against 0.4231")
    turned = compare(there, here)["accuracy"]
    assert verdict("accuracy", turned, True, 52).startswith("this run is worse in ")
    assert verdict("accuracy", compare(here, here)["accuracy"], True, 52).startswith(
        "no significant difference in accuracy"
    )


def test_losses_are_compared_by_a_paired_t_test():
    rng = np.random.default_rng(1)
    common = rng.normal(size=40)
    a, b = common + 0.1 * rng.normal(size=40), common + 0.1 + 0.1 * rng.normal(size=40)
    found = compare(scores(5 * a, np.full(40, 5), "bits_per_byte"), scores(5 * b, np.full(40, 5), "bits_per_byte"))[
        "bits_per_byte"
    ]
    assert found["p_value"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found["p_value"] < 0.01 < stats.ttest_ind(a, b).pvalue, "pairs see what two samples do not"
    assert found["standard_error"] == pytest.approx(stats.sem(a - b))
    assert verdict("bits_per_byte", found, False, 40).startswith("this run is better in bits_per_byte")
    assert verdict("bits_per_byte", found, True, 40).startswith("this run is worse in ")
    single = compare(scores(a[:1], name="bits_per_byte"), scores(b[:1], name="bits_per_byte"))["bits_per_byte"]
    assert single["p_value"] is None
    assert verdict("bits_per_byte", single, False, 1).startswith("no test of bits_per_byte is possible")


def test_a_loss_that_is_not_finite_is_said():
    found = compare(scores([1.0, math.nan], name="loss"), scores([1.0, 2.0], name="loss"))["loss"]
    assert found["p_value"] is None
    assert verdict("loss", found, False, 2) == (
        "no test of loss is possible: nan against 1.5000; difference +nan ± nan (2 examples)"
    )


def test_other_examples_are_refused():
    one = scores([1, 0, 1])
    with pytest.raises(UserError, match=r"not the same .3 and 3 of them, number 1 is the first that differs"):
        compare(one, dataclasses.replace(one, digests=(one.digests[0], b"x", b"y")))
    with pytest.raises(UserError, match=r"not the same .3 and 4 of them, number 3 is the first"):
        compare(one, scores([1, 0, 1, 0]))


def test_an_example_is_known_by_all_that_it_holds():
    batch = {
        "inputs": np.arange(6, dtype=np.int32).reshape(3, 2),
        "lengths": np.array([2, 2, 0], np.int32),
        "targets": np.array([1, 0, 0], np.int32),
        "weights": np.array([1, 1, 0], np.float32),
    }
    assert is_example(batch).tolist() == [True, True, False]
    first = _digest(batch, 0)
    assert first == _digest({name: array[:1] for name, array in batch.items()}, 0), "whoever its batch mates are"
    for name, array in batch.items():
        changed = array.copy()
        changed[0] += 1
        assert _digest({**batch, name: changed}, 0) != first, name
    assert _digest({**batch, "inputs": batch["inputs"].astype(np.int64)}, 0) != first


def test_a_class_that_is_never_answered_or_never_occurs():
    found = per_class(np.array([[3.0, 1, 0], [2, 0, 0], [0, 0, 0]]))
    assert found == {"precision": [3 / 5, 0.0, None], "recall": [3 / 4, 0.0, None], "support": [4.0, 2.0, 0.0]}
