"""What the units of two networks have in common on the same inputs (Li et al. 2015, arXiv 1511.07543).

Units are columns: `a` (n, P) of one network and `b` (n, Q) of the other, at the same n elements; channels of a value,
or features of a dictionary. Nothing relates the numbering of the units of two networks, so they are matched.

Correlations are signed, and a matching makes them as large as possible: of features f >= 0 that is right, while -1 is
the worst. For units whose sign means nothing, give the matching `abs(correlation(a, b))`. A unit that never changes
has no correlation: it is 0 here, never NaN. numpy in float64; all numbers must be finite.
"""

from typing import NamedTuple

import jax
import numpy as np
import scipy.linalg
import scipy.optimize
from jaxtyping import Array, Bool, Float, Int

TOLERANCE = 1e-7  # of the optimality conditions of `sparse_prediction`, whose gradients are at most 1
MOST_ITERATIONS = 20_000


class Matching(NamedTuple):
    """Pairs of a row and a column of a matrix, with their `values`; `rows` are in order."""

    rows: Int[np.ndarray, " M"]
    columns: Int[np.ndarray, " M"]
    values: Float[np.ndarray, " M"]


class Prediction(NamedTuple):
    """`weights` (P, Q) of standardised units and, for each unit of b, the share of its variance that they explain."""

    weights: Float[np.ndarray, "P Q"]
    r2: Float[np.ndarray, " Q"]


def correlation(a: Float[np.ndarray, "n P"], b: Float[np.ndarray, "n Q"]) -> Float[np.ndarray, "P Q"]:
    """Pearson's correlation of every unit of a with every unit of b."""
    return np.clip(standardised(a).T @ standardised(b) / len(a), -1, 1)


def standardised(a: Float[np.ndarray, "n P"]) -> Float[np.ndarray, "n P"]:
    """Every unit with mean 0 and variance 1, or 0 if it never changes."""
    a = np.asarray(a, np.float64)
    # By its range: the variance of equal numbers is 0 only up to rounding.
    varies = np.ptp(a, axis=0) > 0
    deviation = np.where(varies, a.std(axis=0), np.inf)
    return (a - a.mean(axis=0)) / deviation


def one_to_one(c: Float[np.ndarray, "P Q"]) -> Matching:
    """The min(P, Q) pairs, no unit in two of them, with the largest sum of c."""
    rows, columns = scipy.optimize.linear_sum_assignment(c, maximize=True)
    return Matching(rows, columns, c[rows, columns])


def semi(c: Float[np.ndarray, "P Q"]) -> Matching:
    """For every row its largest column, which several rows may share (greedy semi-matching)."""
    rows, columns = np.arange(len(c)), c.argmax(axis=1)
    return Matching(rows, columns, c[rows, columns])


def sparse_prediction(a: Float[np.ndarray, "n P"], b: Float[np.ndarray, "n Q"], penalty: float) -> Prediction:
    """Every unit of b from few units of a, all of them standardised: the w of each unit y of b that minimises

        |y - a w|^2 / (2 n) + penalty |w|_1

    by accelerated proximal gradient (Beck and Teboulle 2009) that restarts where it overshoots. With penalty 1 or more
    every w is 0.
    """
    a, b = standardised(a), standardised(b)
    gram, target = a.T @ a / len(a), a.T @ b / len(a)
    step = 1 / max(float(scipy.linalg.eigvalsh(gram, subset_by_index=[len(gram) - 1] * 2)[0]), TOLERANCE)
    w = ahead = np.zeros_like(target)
    momentum = 1.0
    for _ in range(MOST_ITERATIONS):
        moved = ahead - step * (gram @ ahead - target)
        new = np.sign(moved) * np.maximum(np.abs(moved) - step * penalty, 0)
        if np.abs(new - ahead).max(initial=0) <= step * TOLERANCE:
            w = new
            break
        if ((ahead - new) * (new - w)).sum() > 0:
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - w)
        w, momentum = new, following
    # |y - a w|^2 / n = |y|^2 / n - 2 <w, target> + <w, gram w>, and |y|^2 / n is 1, or 0 of a constant.
    return Prediction(w, (2 * w * target - w * (gram @ w)).sum(axis=0))


def groups(
    a: Float[np.ndarray, "n P"], b: Float[np.ndarray, "n Q"], count: int
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " Q"]]:
    """The units of both networks in `count` groups, 0 to count - 1, -1 for units without a correlation: spectral
    clustering of |correlation|.

    With A the |correlation| of all P + Q units, 0 on the diagonal, and D its row sums: the leading eigenvectors of
    D^-1/2 A D^-1/2, each row assigned by a pivoted QR decomposition (Damle et al. 2019, arXiv 1609.08251), which needs
    no random start.
    """
    units = np.concatenate([a, b], axis=1)
    strength = np.abs(correlation(units, units))
    np.fill_diagonal(strength, 0)
    there = np.flatnonzero(strength.sum(axis=1) > 0)
    if not 1 <= count <= len(there):
        raise ValueError(f"count={count}: must be 1 to {len(there)}, the number of units that correlate with another")
    strength = strength[np.ix_(there, there)]
    root = 1 / np.sqrt(strength.sum(axis=1))
    last = [len(there) - count, len(there) - 1]
    _, vectors = scipy.linalg.eigh(root[:, None] * strength * root, subset_by_index=last)
    _, pivots = scipy.linalg.qr(vectors.T, mode="r", pivoting=True)
    left, _, right = np.linalg.svd(vectors[pivots[:count]].T)
    labels = np.full(units.shape[1], -1)
    labels[there] = np.abs(vectors @ (left @ right)).argmax(axis=1)
    return labels[: a.shape[1]], labels[a.shape[1] :]


def rolled(b: np.ndarray, key: Array, lengths: Int[np.ndarray, " B"] | None = None, period: int = 1) -> np.ndarray:
    """Every sequence of b (B, L, ...) turned by its own random offset: a null that keeps what a unit does over time,
    and breaks what it has to do with the inputs.

    Offsets are the multiples of `period` that are not 0, for units that depend on the position by a period. Only the
    first `lengths` elements of a sequence are turned; one without such a multiple below its length stays as it is.
    """
    count, length = b.shape[:2]
    lengths = np.full(count, length) if lengths is None else np.asarray(lengths)
    choices = np.maximum(lengths - 1, 0) // period
    drawn = np.asarray(jax.random.uniform(key, (count,)), np.float64)
    offsets = np.where(choices > 0, period * (1 + (drawn * choices).astype(int)), 0)
    place = np.arange(length)
    turned = (place - offsets[:, None]) % np.maximum(lengths, 1)[:, None]
    return b[np.arange(count)[:, None], np.where(place < lengths[:, None], turned, place)]


def kappa(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> float:
    """Cohen's kappa of two masks of the same elements, (p - e) / (1 - e): p is the share where they agree, and e that
    of masks of the same rates which have nothing to do with each other.

    1 is the same mask, 0 no more agreement than by chance, or a mask that is the same everywhere.
    """
    rates = float(a.mean()), float(b.mean())
    if {0.0, 1.0} & set(rates):
        return 0.0
    chance = rates[0] * rates[1] + (1 - rates[0]) * (1 - rates[1])
    return (float((a == b).mean()) - chance) / (1 - chance)
