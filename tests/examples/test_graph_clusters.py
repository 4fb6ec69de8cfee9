"""SCGC: the public numbers, what is left without the contrast, and clusters of a graph that tells them apart."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import graph_clusters as scgc
from tests.helpers import assert_close

FIXTURE = Path(__file__).parents[1] / "parity/fixtures/wide/scgc.npz"
TAU = 0.5  # of the numbers


@pytest.fixture(scope="module")
def arrays():
    with np.load(FIXTURE) as file:
        return {name: jnp.asarray(file[name]) for name in file.files}


def published(z, near):
    """The public loss: a node's cosine with itself is 0 there, and counts as exp(0) in both sums."""
    among_near, among_all = scgc.contrast_sums(z, near, TAU)
    return jnp.mean(jnp.log(among_all + 1) - jnp.log(among_near + jnp.diag(near)))


def without_diagonal(z, near):
    """Ours with loops, in float64."""
    terms = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        weights = {j: np.exp(TAU * z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j])) for j in others}
        terms.append(-np.log(sum(near[i, j] * weights[j] for j in others) / sum(weights.values())))
    return np.mean(terms)


def test_the_numbers_are_those_of_the_public_code(arrays):
    @jax.jit
    def run(z, q, adjacency):
        near = scgc.influence(adjacency, 3)
        both = jax.value_and_grad(published)(z, arrays["influence"])
        return near, both, scgc.sharpened(q), scgc.contrastive_loss(z, near, TAU)

    near, (loss, gradient), target, ours = run(arrays["z"], arrays["q"], arrays["adjacency"])
    assert_close(near, arrays["influence"])
    assert_close(loss, arrays["loss"])
    assert_close(gradient, arrays["g/z"])
    assert_close(target, arrays["target"])
    expected = without_diagonal(*(np.asarray(arrays[name], np.float64) for name in ("z", "influence")))
    assert_close(ours, expected)
    assert expected - float(loss) > 0.05


def test_rows_of_the_normalised_graph_have_the_sum_1_and_a_lonely_node_has_no_term():
    graph = jnp.zeros((3, 3)).at[0, 1].set(2.0).at[1, 0].set(2.0)
    a = scgc.normalized(graph)
    np.testing.assert_allclose(a, [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0], [0, 0, 1]], rtol=1e-6)
    value, gradient = jax.jit(jax.value_and_grad(scgc.contrastive_loss))(jnp.eye(3) + 0.1, a, TAU)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.breadth  # test_the_numbers_are_those_of_the_public_code
def test_clusters_follow_the_graph_unless_the_contrast_is_0():
    """Two cliques, and attributes that say nothing of them."""
    pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
    draw, blocks = np.random.default_rng(0), np.arange(20) % 2
    x = jnp.asarray(draw.standard_normal((20, 16)), jnp.float32)
    linked = lambda labels: jnp.asarray(labels[:, None] == labels[None], jnp.float32)
    cliques, other = linked(blocks), linked(np.arange(20) // 10)
    cluster = lambda graph, contrast: scgc.cluster(x, graph, 2, jax.random.key(0), contrast=contrast, steps=200)
    labels, q = cluster(cliques, 1.0)
    assert scgc.accuracy(labels, blocks) == 1.0
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(labels, q.argmax(1))
    alone = cluster(cliques, 0.0)
    assert_close(cluster(other, 0.0), alone)
    assert scgc.accuracy(alone[0], blocks) < 0.9


def test_the_accuracy_is_that_of_the_best_matching():
    assert scgc.accuracy(np.array([2, 2, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 1])) == pytest.approx(5 / 6)


@pytest.mark.breadth  # its parts have tests of their own here
def test_three_steps(monkeypatch):
    pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
    for name, value in {"NODES": 40, "INSIDE": 0.6, "ACROSS": 0.2}.items():  # of fewer edges, nodes are alone
        monkeypatch.setattr(scgc, name, value)
    found = scgc.run(range(2), 3)
    assert set(found) == {"scgc", "contrast_0", "kmeans", "spectral", "kmeans_smoothed"}
    values = np.array([row["accuracy"] for row in found.values()])
    assert values.shape == (5, 2)
    assert ((values >= 0.25) & (values <= 1)).all()
