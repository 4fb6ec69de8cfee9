"""Softmax within the clusters of a vocabulary, for class-factored distributions (Goodman 2001, Classes for fast
maximum entropy training, ICASSP)."""

import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array, Float, Int

Clusters = tuple[int, ...]  # of every symbol of a vocabulary its cluster, of 0..K-1


def check_clusters(clusters: Clusters, vocabulary_size: int) -> None:
    """Raise ValueError unless there is a cluster for each of V symbols, and a symbol in each of the K clusters."""
    if len(clusters) != vocabulary_size:
        raise ValueError(f"clusters: must be one for each of the {vocabulary_size} symbols, not {len(clusters)}")
    if not clusters:
        raise ValueError("clusters: must be one for each of at least 1 symbol")
    found = set(clusters)
    if found != set(range(len(found))):
        raise ValueError(
            f"clusters: must be numbered from 0 without gaps, not {min(found)}..{max(found)} of which "
            f"{len(found)} have symbols"
        )


def members(clusters: Clusters) -> Int[np.ndarray, "K M"]:
    """The symbols of every cluster, in order; M is the size of the largest, and -1 fills the others."""
    cluster = np.asarray(clusters)
    sizes = np.bincount(cluster)
    order = np.argsort(cluster, kind="stable")
    rank = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[cluster[order]]
    table = np.full((len(sizes), sizes.max()), -1)
    table[cluster[order], rank] = order
    return table


def log_softmax_within(scores: Float[Array, "*N V"], clusters: Clusters) -> Float[Array, "*N V"]:
    """log p(v | c(v)) = s(v) - log sum of exp s(u) over the symbols u of the cluster of v, in float32.

    Costs K M exponentials, with M the size of the largest cluster: clusters of similar sizes are cheap.
    """
    scores, table = scores.astype(jnp.float32), members(clusters)
    grouped = jnp.where(table >= 0, scores[..., np.maximum(table, 0)], -jnp.inf)
    return scores - logsumexp(grouped, axis=-1)[..., np.asarray(clusters)]


def join(coarse: Float[Array, "*N K"], scores: Float[Array, "*N V"], clusters: Clusters) -> Float[Array, "*N V"]:
    """log p(v) = log p(c(v)) + log p(v | c(v)), from the logits of clusters and the scores of symbols, in float32."""
    coarse = coarse.astype(jnp.float32)
    of_clusters = coarse - logsumexp(coarse, axis=-1, keepdims=True)
    return of_clusters[..., np.asarray(clusters)] + log_softmax_within(scores, clusters)
