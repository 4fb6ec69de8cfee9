"""SCGC (Kulatilleke et al. 2022, arXiv 2204.12656): clusters of nodes by their attributes and by their graph.

    python -m examples.graph_clusters [--seeds=5] [--out=FILE]

An encoder z = f(x) never sees the graph; its loss does. A is the graph with self-loops, rows divided by their sums;
I = A + A^2 + .. + A^order is the influence of node j on node i; s_ij is the cosine of z_i and z_j:

    contrast   mean over i of  -log( sum_{j != i} I_ij exp(tau s_ij) / sum_{j != i} exp(tau s_ij) )
    sharpen    mean over i of  KL(p_i | q_i),   q_ij in proportion to 1 / (1 + |z_i - c_j|^2),
               p_ij in proportion to q_ij^2 / sum_i q_ij, which is constant for the gradient
    loss       |x - decoded|^2 per number + `contrast` times the first + `sharpen` times the second

Where this differs from the public code: it sets the cosine of a node with itself to 0 before the exponential, so that
it counts as exp(0) in both sums, where we leave it out; its scores are the best of all epochs by the true labels, where
ours are those of the last step; its tau, weights and order differ between data sets; and it starts from a pretrained
autoencoder.

Use it for anything with attributes and a graph: of the channels or features of a trained model, say, `x` is their
weights and `graph` their co-activation.

    labels, q = cluster(x, graph, clusters=4, key=jax.random.key(0))

Data of the example: a block model of 300 nodes, 4 blocks, edges with probability 0.08 inside a block and 0.02 across,
attributes of 16 numbers around one of 4 means. Accuracy is that of the best matching of clusters and blocks:

    scgc, contrast_0     this; the second ignores the graph
    kmeans               k-means of x
    spectral             of the graph
    kmeans_smoothed      k-means of A^2 x
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from examples import _fit
from experiments.common.errors import UserError

NODES, BLOCKS, ATTRIBUTES = 300, 4, 16
INSIDE, ACROSS, SEPARATION = 0.08, 0.02, 0.6
HIDDEN, Z, RATE, STEPS = 64, 16, 1e-3, 400

Params = dict[str, Any]


def normalized(graph: Float[Array, "N N"]) -> Float[Array, "N N"]:
    """The graph with self-loops, rows divided by their sums."""
    loops = graph + jnp.eye(len(graph))
    return loops / loops.sum(1, keepdims=True)


def influence(a: Float[Array, "N N"], order: int) -> Float[Array, "N N"]:
    """A + A^2 + .. + A^order."""
    power, total = a, a
    for _ in range(order - 1):
        power = power @ a
        total = total + power
    return total


def contrast_sums(
    z: Float[Array, "N Z"], near: Float[Array, "N N"], tau: Any
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """sum over j != i of near_ij exp(tau s_ij), and of exp(tau s_ij)."""
    unit = z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-6)
    weights = jnp.exp(tau * unit @ unit.T) * (1 - jnp.eye(len(z)))
    return (near * weights).sum(1), weights.sum(1)


def contrastive_loss(z: Float[Array, "N Z"], near: Float[Array, "N N"], tau: Any) -> Float[Array, ""]:
    """Nodes without an edge have no term."""
    among_near, among_all = contrast_sums(z, near, tau)
    linked = among_near > 0
    return jnp.mean(jnp.where(linked, jnp.log(among_all) - jnp.log(jnp.where(linked, among_near, 1.0)), 0.0))


def soft_labels(z: Float[Array, "N Z"], centers: Float[Array, "K Z"]) -> Float[Array, "N K"]:
    """q: Student's t of one degree of freedom around the centers, normalised."""
    q = 1 / (1 + jnp.square(z[:, None] - centers[None]).sum(-1))
    return q / q.sum(1, keepdims=True)


def sharpened(q: Float[Array, "N K"]) -> Float[Array, "N K"]:
    """p: q^2 over the size of the cluster, normalised."""
    weight = jnp.square(q) / q.sum(0, keepdims=True)
    return weight / weight.sum(1, keepdims=True)


def kl(p: Float[Array, "N K"], q: Float[Array, "N K"]) -> Float[Array, ""]:
    """The mean over rows of KL(p | q)."""
    return (p * (jnp.log(p) - jnp.log(q))).sum(1).mean()


def cluster(
    x: Float[Array, "N F"],
    graph: Float[Array, "N N"],
    clusters: int,
    key: Array,
    *,
    order: int = 3,
    tau: float = 1.0,
    contrast: float = 1.0,
    sharpen: float = 0.1,
    steps: int = STEPS,
) -> tuple[Int[np.ndarray, "N"], Float[Array, "N K"]]:
    """Labels (N,) and soft labels (N, K). `graph` holds weights of 0 or more between nodes. Half of the steps train
    without clusters, whose centers then start at those of k-means of z. With contrast = 0 the graph does not count."""
    params = initialize(key, x.shape[1])
    near = influence(normalized(graph), order)
    weights = {"tau": tau, "contrast": contrast, "sharpen": 0.0}
    start = params | {"centers": jnp.zeros((clusters, Z))}
    params = _learn(start, x, near, weights, max(steps // 2, 1))
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    params["centers"] = jnp.asarray(kmeans(np.asarray(encode(params, x)), clusters, seed)[1])
    params = _learn(params, x, near, weights | {"sharpen": sharpen}, max(steps // 2, 1))
    q = soft_labels(encode(params, x), params["centers"])
    return np.asarray(q.argmax(1)), q


def initialize(key: Array, features: int) -> Params:
    """Weights of the encoder and of the decoder, two layers each, with LeCun's start."""
    sizes = ((features, HIDDEN), (HIDDEN, Z), (Z, HIDDEN), (HIDDEN, features))
    keys = jax.random.split(key, len(sizes))
    return {"layers": [jax.random.normal(key, size) / size[0] ** 0.5 for key, size in zip(keys, sizes, strict=True)]}


def encode(params: Params, x: Float[Array, "N F"]) -> Float[Array, "N Z"]:
    return jax.nn.relu(x @ params["layers"][0]) @ params["layers"][1]


def decode(params: Params, z: Float[Array, "N Z"]) -> Float[Array, "N F"]:
    return jax.nn.relu(z @ params["layers"][2]) @ params["layers"][3]


@functools.partial(jax.jit, static_argnums=4)
def _learn(params: Params, x: Array, near: Array, weights: dict[str, Any], steps: int) -> Params:
    def loss(params: Params, _: Array) -> Array:
        z = encode(params, x)
        q = soft_labels(z, params["centers"])
        terms = jnp.square(x - decode(params, z)).mean()
        terms += weights["contrast"] * contrastive_loss(z, near, weights["tau"])
        return terms + weights["sharpen"] * kl(jax.lax.stop_gradient(sharpened(q)), q)

    return _fit.fit(loss, params, lambda step: step, optax.adam(RATE), steps)[0]


def kmeans(x: Float[np.ndarray, "N F"], clusters: int, seed: int) -> tuple[Int[np.ndarray, "N"], Array]:
    """Labels and centers, the best of ten starts."""
    found = _sklearn().KMeans(clusters, n_init=10, random_state=seed).fit(x)
    return found.labels_, found.cluster_centers_


def _sklearn() -> Any:
    try:
        import sklearn.cluster
    except ImportError as error:
        raise UserError("k-means is scikit-learn's: pip install scikit-learn") from error
    return sklearn.cluster


def accuracy(labels: Int[np.ndarray, "N"], blocks: Int[np.ndarray, "N"]) -> float:
    """The share of nodes in the cluster of their block, under the best matching of the two."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((max(labels) + 1, max(blocks) + 1))
    np.add.at(counts, (labels, blocks), 1)
    return float(counts[linear_sum_assignment(-counts)].sum() / len(labels))


def block_model(seed: int) -> tuple[Float[Array, "N F"], Float[Array, "N N"], Int[np.ndarray, "N"]]:
    """Attributes, a symmetric graph of 0 and 1, and the block of every node."""
    draw = np.random.default_rng(seed)
    blocks = np.arange(NODES) % BLOCKS
    chance = np.where(blocks[:, None] == blocks[None], INSIDE, ACROSS)
    upper = np.triu(draw.random((NODES, NODES)) < chance, 1)
    means = SEPARATION * draw.standard_normal((BLOCKS, ATTRIBUTES))
    x = means[blocks] + draw.standard_normal((NODES, ATTRIBUTES))
    return jnp.asarray(x, jnp.float32), jnp.asarray(upper + upper.T, jnp.float32), blocks


def measure(seed: int, steps: int) -> dict[str, float]:
    x, graph, blocks = block_model(seed)
    key = jax.random.key(seed)
    smooth = np.asarray(normalized(graph) @ (normalized(graph) @ x))
    spectral = _sklearn().SpectralClustering(BLOCKS, affinity="precomputed", random_state=seed)
    found = {
        "scgc": cluster(x, graph, BLOCKS, key, steps=steps)[0],
        "contrast_0": cluster(x, graph, BLOCKS, key, contrast=0.0, steps=steps)[0],
        "kmeans": kmeans(np.asarray(x), BLOCKS, seed)[0],
        "spectral": spectral.fit_predict(np.asarray(graph)),
        "kmeans_smoothed": kmeans(smooth, BLOCKS, seed)[0],
    }
    return {arm: accuracy(labels, blocks) for arm, labels in found.items()}


def run(seeds: range, steps: int) -> dict[str, Any]:
    found = [measure(seed, steps) for seed in seeds]
    return {arm: {"accuracy": [row[arm] for row in found]} for arm in found[0]}


if __name__ == "__main__":
    _fit.main(run, steps=STEPS)
