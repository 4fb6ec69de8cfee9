"""Selections against sorting, and the arithmetic of trained dictionaries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat.interp import dictionaries
from seqboat.interp.dictionaries import Atoms
from tests.helpers import assert_close, normal

SIZE, WIDTH = 11, 6
# Random features, ties of every kind, one feature, none at all, and all of them.
ROWS = np.stack(
    [
        *np.maximum(np.random.default_rng(0).standard_normal((9, SIZE)), 0),
        [5, 5, 3, 3, 3, 2, 2, 1, 0, 0, 0],
        np.full(SIZE, 2.0),
        np.eye(SIZE)[3],
        np.zeros(SIZE),
        1 + np.arange(SIZE) / 7,
    ]
).astype(np.float32)
NORMS = np.linspace(0, 6, len(ROWS)).astype(np.float32)
COUNTS = (1, 2, 3, 5, 9, SIZE)  # below and above FEW


def above(f: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return np.where((f >= threshold) & (f > 0), f, 0)


def top_k_by_sort(f: np.ndarray, k: int) -> np.ndarray:
    return above(f, np.sort(f, axis=1)[:, -k, None])


def batch_top_k_by_sort(f: np.ndarray, k: int) -> np.ndarray:
    return above(f, np.sort(f.ravel())[-k * len(f)])


def by_norm_by_sort(f: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Of equal features all or none: only the ends of ties are candidates."""
    kept = []
    for row, wanted in zip(f.astype(np.float64), norm, strict=True):
        thresholds = np.unique(row[row > 0])[::-1]
        distances = [abs(np.sqrt(np.square(row[row >= threshold]).sum()) - wanted) for threshold in thresholds]
        kept.append(above(row, thresholds[int(np.argmin(distances))]) if len(thresholds) else row)
    return np.stack(kept)


@pytest.fixture(scope="module")
def selected():
    """All selections of all counts, by one program."""

    @jax.jit
    def run(f, norm):
        found = {("top_k", k): dictionaries.top_k(f, k) for k in COUNTS}
        found |= {("batch_top_k", k): dictionaries.batch_top_k(f, k) for k in COUNTS}
        return {**found, ("norm", 0): dictionaries.by_norm(f, norm)}

    return run(ROWS, NORMS)


@pytest.mark.parametrize("k", COUNTS)
def test_the_largest_features_are_those_of_sorting(selected, k):
    np.testing.assert_array_equal(selected["top_k", k], top_k_by_sort(ROWS, k))
    kept, least = selected["batch_top_k", k]
    expected = batch_top_k_by_sort(ROWS, k)
    np.testing.assert_array_equal(kept, expected)
    assert least == expected[expected > 0].min()


def test_the_features_of_nearest_norm_are_those_of_sorting(selected):
    kept = np.asarray(selected["norm", 0])
    np.testing.assert_array_equal(kept, by_norm_by_sort(ROWS, NORMS))
    assert (kept > 0).any(1).tolist() == (ROWS > 0).any(1).tolist(), "at least one, where there is one"


def random_atoms(select: str, k: int = 2) -> Atoms:
    decoder = normal(1, SIZE, WIDTH)
    decoder /= jnp.linalg.norm(decoder, axis=1, keepdims=True)
    centre = normal(2, WIDTH)
    return Atoms(decoder.T, normal(3, SIZE) / 4, decoder, centre, centre, jnp.float32(1.2), select, k)


@pytest.mark.parametrize("select", dictionaries.SELECTIONS)
def test_a_row_is_encoded_by_itself(select):
    atoms, x = random_atoms(select), 2 * normal(4, 3, 4, WIDTH)
    f = np.asarray(jax.jit(Atoms.encode)(atoms, x))
    z = np.asarray(x - atoms.centre[None, None])
    plain = np.maximum(z @ np.asarray(atoms.encoder) + np.asarray(atoms.bias), 0).reshape(-1, SIZE)
    expected = {
        "relu": plain,
        "top_k": top_k_by_sort(plain, 2),
        "batch_top_k": above(plain, np.float32(1.2)),
        "norm": by_norm_by_sort(plain, np.linalg.norm(z, axis=-1).ravel()),
    }[select]
    assert_close(f.reshape(-1, SIZE), expected.astype(np.float32))
    assert ((f.reshape(-1, SIZE) > 0) == (expected > 0)).all()
    assert_close(atoms.decode(jnp.asarray(f)), f @ np.asarray(atoms.decoder) + np.asarray(atoms.offset))


def test_health_of_a_dictionary_that_is_a_basis_and_of_one_that_is_not():
    basis = jnp.eye(3)
    zero = jnp.zeros(3)
    atoms = Atoms(basis, zero, basis, zero, zero, jnp.zeros(()), "relu")
    x = jnp.array([[1.0, 0, 0], [0, 2, 0], [3, 4, 0], [0, 0, 0]])
    of = jax.jit(dictionaries.health)
    whole = of(atoms, x)
    assert (float(whole.nmse), float(whole.coherence), float(whole.deviation)) == (0, 0, 0)
    assert float(whole.l0) == 1
    assert float(whole.dead) == pytest.approx(1 / 3)
    assert whole.norms.tolist() == [[1, 1], [2, 2], [5, 5], [0, 0]]

    twice = jnp.array([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    skewed = of(atoms.replace(encoder=twice.T, decoder=twice), x)
    assert float(skewed.coherence) == pytest.approx(0.6)
    f = np.asarray(x) @ np.asarray(twice).T
    error = np.square(np.asarray(x) - f @ np.asarray(twice)).sum()
    assert float(skewed.nmse) == pytest.approx(error / np.square(np.asarray(x) - np.asarray(x).mean(0)).sum(), rel=1e-5)
    squares = np.square(f).sum(1)[:3]
    bounds = abs(np.square(np.asarray(x)).sum(1)[:3] - squares) / (2 * squares)
    assert float(skewed.deviation) == pytest.approx(bounds.sum() / 4, rel=1e-5)


@pytest.mark.breadth  # test_health_of_a_dictionary_that_is_a_basis_and_of_one_that_is_not
def test_a_transcoder_is_healthy_about_its_targets():
    atoms, x = random_atoms("top_k"), normal(5, 9, WIDTH)
    target = jnp.tile(atoms.decode(atoms.encode(x)), 2)
    wide = atoms.replace(decoder=jnp.tile(atoms.decoder, 2), offset=jnp.tile(atoms.offset, 2))
    found = jax.jit(functools.partial(dictionaries.health))(wide, x, target)
    assert float(found.nmse) < 1e-10
