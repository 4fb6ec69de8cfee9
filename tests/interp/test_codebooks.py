"""Codebooks of vectors: which codes are nearest, the straight-through gradient, and k-means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal

from seqboat.interp.codebooks import Codebook, decode, kmeans, nearest, quantize
from seqboat.interp.edits import Force

X, TABLES = normal(0, 3, 5, 6), {1: normal(1, 1, 7, 6), 2: normal(2, 2, 40, 3)}  # by the number of groups


def brute_force(x, table, k):
    """(*B, G, k) by looking at every code."""
    groups, _, width = table.shape
    parts = np.asarray(x).reshape(*x.shape[:-1], groups, 1, width)
    table = np.asarray(table)
    distances = np.square(parts - table).sum(-1)
    cosines = (parts * table).sum(-1) / np.linalg.norm(table, axis=-1) / np.linalg.norm(parts, axis=-1)
    return np.argsort(distances if k == 1 else -cosines, axis=-1)[..., :k]


@pytest.mark.parametrize(("groups", "k"), grid([(1, 1), (2, 3)], (2, 3)))
def test_nearest_codes_are_those_of_brute_force_and_gradients_those_of_the_surrogate(groups, k):
    table, weights = TABLES[groups], normal(9, *X.shape)

    @jax.jit
    def run(x, table):
        y, back = jax.vjp(lambda x, table: quantize(x, table, k), x, table)
        return nearest(x, table, k), y, back(weights)

    ids, y, (dx, dtable) = run(X, table)
    np.testing.assert_array_equal(ids, brute_force(X, table, k))
    parts = np.stack([np.asarray(table)[g, np.asarray(ids)[..., g, :]].sum(-2) for g in range(groups)], axis=-2)
    assert_close(y, parts.reshape(X.shape))
    np.testing.assert_array_equal(dx, weights)  # straight through

    # The surrogate <g, x^> with the choice of codes held fixed, by central differences.
    surrogate = jax.jit(jax.vmap(lambda change: (weights * decode(table + change, ids)).sum()))
    step = 0.5  # it is linear, so that no step is too large
    changes = step * jnp.eye(table.size).reshape(-1, *table.shape)
    found = (surrogate(changes) - surrogate(-changes)) / (2 * step)
    assert_close(dtable, found.reshape(table.shape), 1e-4)
    taken = np.zeros(table.shape[:2], bool)
    for group in range(groups):
        taken[group, np.asarray(ids)[..., group, :].ravel()] = True
    assert 0 < taken.sum() < taken.size
    assert not np.asarray(dtable)[~taken].any()


@pytest.mark.breadth  # tests/models/test_bottlenecked.py: edits; test_edits.py: what is forced
def test_a_codebook_as_an_edit_and_codes_that_are_forced():
    book, here = Codebook(True, TABLES[2], 3), np.zeros(X.shape[:2], bool)
    here[1, 2] = True
    plain = np.asarray(book(X))
    assert_close(plain, quantize(X, TABLES[2], 3))
    ids = jnp.array([[6, 0, 1], [2, 3, 4]])
    wanted = decode(TABLES[2], ids)
    forced = Force(here, jnp.broadcast_to(ids, (*here.shape, 2, 3)), book)
    for x in (X, X.reshape(-1, 6)):  # as it is, and as the rows of a dense layer
        changed = np.asarray(forced(x)).reshape(X.shape)
        assert_close(changed[1, 2], wanted)
        np.testing.assert_array_equal(changed[~here], plain[~here])
    assert_close(Force(True, ids, book)(X), np.broadcast_to(wanted, X.shape))
    with pytest.raises(ValueError, match=r"codes of shape \(2, 2\), expected \(2, 3\), the groups and k"):
        Force(True, ids[:, :2], book)(X)
    with pytest.raises(ValueError, match="a codebook of 2 groups of 3 channels at a value of 5"):
        book(X[..., :5])
    with pytest.raises(ValueError, match=r"k=8: must be in 1\.\.7, the codes"):
        nearest(X, TABLES[1], 8)


def test_kmeans_finds_planted_clusters():
    rng = np.random.default_rng(0)
    centres = 10 * np.arange(6)[:, None] * np.ones(3)
    sizes = [40, 2, 10, 10, 10, 28]  # most random rows are of two clusters
    x = np.repeat(centres, sizes, axis=0) + 0.1 * rng.standard_normal((100, 3))
    found = np.asarray(kmeans(jnp.asarray(x, jnp.float32), 6, jax.random.key(1), rounds=4))
    expected = [part.mean(0) for part in np.split(x, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(found[np.argsort(found[:, 0])], expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"codes=101: must be in 1\.\.100, the rows"):
        kmeans(jnp.asarray(x, jnp.float32), 101, jax.random.key(1))
