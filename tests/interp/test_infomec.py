"""InfoMEC of codes whose scores are known, and its parts against scikit-learn."""

import re

import numpy as np
import pytest

from seqboat.interp import infomec as module
from seqboat.interp.infomec import infomec, information, probe

ROWS, S, K = 3**4 * 4, 4, 3
RNG = np.random.default_rng(0)
# Every combination of four sources of three values, four times: exactly independent.
SOURCES = np.tile(np.stack(np.meshgrid(*[np.arange(K)] * S, indexing="ij"), -1).reshape(-1, S), (4, 1))
NOISE = RNG.integers(K, size=(ROWS, S))


def permuted(array, seed=1):
    return np.random.default_rng(seed).permutation(array)


# Latents, whether they are labels, and the modularity, compactness and active latents that they have.
CODES = {
    "perfect": (SOURCES, True, 1, 1, 4),
    "permuted and scaled": (5 - 3.0 * SOURCES[:, [2, 0, 3, 1]], False, 1, 1, 4),
    # Every source is in two latents of eight: (1/2 - 1/8) / (1 - 1/8).
    "duplicated": (np.concatenate([SOURCES, -SOURCES], 1), True, 1, 3 / 7, 8),
    # A latent of two sources tells either as much: (1/2 - 1/4) / (1 - 1/4), in the mean with the two of one source.
    "mixed": (np.stack([SOURCES[:, 0] * K + SOURCES[:, 1], *SOURCES[:, 2:].T], 1), True, 7 / 9, 1, 3),
    "with a constant": (np.concatenate([SOURCES, np.full((ROWS, 1), 7)], 1), True, 1, 1, 4),
    "with a narrow one": (np.concatenate([SOURCES, NOISE[:, :1] / 50], 1), False, 1, 1, 4),
    "constant": (np.full((ROWS, S), 0.5), False, 0, 0, 0),
    "one": (SOURCES[:, :1], True, 1, 0, 1),
}


@pytest.mark.parametrize("name", CODES)
def test_scores_of_codes_that_are_known(name, monkeypatch):
    monkeypatch.setattr(module, "explicitness", lambda z, labels: 0.5)
    latents, discrete, m, c, count = CODES[name]
    found = infomec(SOURCES, latents, discrete)
    assert (found.m, found.c) == (pytest.approx(m), pytest.approx(c))
    assert found.e == (0.5 if count else 0)
    assert found.active.sum() == count
    assert found.nmi.shape == (S, latents.shape[1])
    assert not found.nmi[:, ~found.active].any()
    if name == "perfect":
        np.testing.assert_allclose(found.nmi, np.eye(S), atol=1e-12)


def test_a_probe_reads_what_is_there_and_nothing_else():
    found = infomec(SOURCES, SOURCES, True)
    assert 0.9 < found.e < 1, "the ridge keeps the probe from certainty"
    half = infomec(SOURCES, np.concatenate([SOURCES[:, :2], NOISE[:, 2:]], 1), True)
    assert abs(half.e - found.e / 2) < 0.02
    noise = infomec(SOURCES, NOISE, True)
    assert noise.e < 0.01, "the rows that it is scored on are not those that it was fitted on"
    assert 0 < noise.m < 1, "chance is not 0: permute the rows to see how much it is"
    # A source as one number with the middle value between the others is explicit, one in no order is not.
    unordered = infomec(SOURCES, np.array([0, 2, 1])[SOURCES] % 2, True)
    assert unordered.m == pytest.approx(1)
    assert 0.2 < unordered.e < 0.7


def test_the_null_of_a_code_is_the_code_with_its_rows_permuted():
    found = infomec(SOURCES, permuted(SOURCES), True)
    assert found.nmi.max() < 0.03
    assert found.e < 0.01


@pytest.mark.breadth  # the closed values of this file
def test_information_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = RNG.integers(5, size=300), RNG.integers(4, size=300)
    b = np.where(RNG.random(300) < 0.5, b, a % 4)
    expected = metrics.mutual_info_score(a, b)
    assert expected > 0.1
    assert information(a, b) == pytest.approx(expected)
    assert information(b, a) == pytest.approx(expected)
    nmi = infomec(np.stack([a, b], 1), np.stack([b, b], 1), True).nmi
    for row, labels in zip(nmi, (a, b), strict=True):
        np.testing.assert_allclose(row, metrics.mutual_info_score(labels, b) / module.entropy(labels))


def test_the_probe_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    x = RNG.normal(size=(ROWS // 2, S)).astype(np.float32)
    y = (x @ RNG.normal(size=(S, K)) + RNG.gumbel(size=(len(x), K))).argmax(1)
    kernel, bias = (np.asarray(part) for part in probe(x, y, K))
    model = linear.LogisticRegression(C=1 / (len(x) * module.RIDGE), tol=1e-8, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(kernel.T, model.coef_, atol=2e-3)
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_, atol=2e-3)


def test_continuous_latents_are_cut_into_ten():
    parts = module.quantiles(RNG.normal(size=1000))
    assert np.bincount(parts).tolist() == [100] * 10
    two = module.quantiles(np.array([0.0, 1.0] * 50))
    assert len(set(two)) == 2, "ties stay together"


NAN = np.where(np.arange(ROWS)[:, None] == 5, np.nan, SOURCES)


@pytest.mark.parametrize(
    ("sources", "latents", "message"),
    [
        (SOURCES[:9], NOISE[:8], "sources (9, 4) and latents (8, 4): must have as many rows"),
        (SOURCES[:1], NOISE[:1], "sources (1, 4): one row tells nothing; at least 2 are needed"),
        (SOURCES, NAN, "latents: row 5 is not finite"),
        (NAN, NOISE, "sources: row 5 is not finite"),
        (SOURCES[:, 0], NOISE, "sources (324,): must be (rows, columns), with one column or more"),
        (SOURCES, NOISE[:, :0], "latents (324, 0): must be (rows, columns), with one column or more"),
        (
            SOURCES * [1, 0, 1, 1],
            NOISE,
            "sources: column 1 never varies, so that nothing can be told of it; leave it out",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(sources, latents, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        infomec(sources, latents, True)
