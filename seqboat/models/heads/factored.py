"""A class-factored softmax (Goodman 2001, Classes for fast maximum entropy training, ICASSP): first the cluster of a
symbol, then the symbol in it.

    log p(v | x) = log softmax(x A + a)[c(v)] + log softmax within c(v) of (x W + b)[v]

Both factors read the same features. With one cluster, or one for every symbol, it is a plain softmax.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.choices import given
from seqboat.layers.initializers import truncated_normal
from seqboat.models.head import Head, HeadConfig
from seqboat.ops.clusters import Clusters, check_clusters, join


@dataclasses.dataclass(frozen=True)
class Config(HeadConfig):
    """`clusters` (V,) has the cluster of every symbol. Raises ValueError for clusters without symbols, and when made
    for another number of outputs."""

    clusters: tuple[int, ...] = given()

    def __post_init__(self):
        check_clusters(self.clusters, len(self.clusters))

    def make(self, features: int, outputs: int, **owner: Any) -> Head:
        check_clusters(self.clusters, outputs)
        return Factored(self.clusters, **owner)


class Factored(Head):
    """x (..., D) -> log p (..., V), normalised: its softmax is itself."""

    clusters: Clusters

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"], train: bool = False) -> Float[Array, "*N V"]:
        x = x.astype(jnp.float32)
        coarse = nn.Dense(max(self.clusters) + 1, kernel_init=truncated_normal(), name="coarse")(x)
        scores = nn.Dense(len(self.clusters), kernel_init=truncated_normal(), name="fine")(x)
        return join(coarse, scores, self.clusters)
