"""Handwritten digits as 16 tokens: squares of 2 x 2 pixels, row by row, each the nearest of a codebook of k-means.

Real data for models of tokens with clusters (`seqboat.models.coarse_to_fine`). A cluster holds codes that are near one
another, by k-means of the codebook. Both come from the training pictures of `digits`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments.common.config import within
from experiments.data.sources import Source
from experiments.tasks import digits
from experiments.tasks.codes import BEGIN, FIRST_CODE, CodesTask, example
from seqboat.interp.codebooks import kmeans, nearest
from seqboat.ops.clusters import Clusters

ROUNDS = 50  # of k-means


@dataclasses.dataclass(frozen=True)
class Config:
    """`codes` of the codebook, in `coarse` clusters.

    `shuffled` gives models clusters of the same sizes, of codes drawn at random: a control.
    """

    begin: ClassVar[int] = BEGIN
    length: ClassVar[int] = 17
    codes: int = 256
    coarse: int = 16
    shuffled: bool = False

    def __post_init__(self):
        within(self, 2, 1024, "codes")
        within(self, 1, self.codes, "coarse")

    @property
    def vocabulary_size(self) -> int:
        return FIRST_CODE + self.codes

    @functools.cached_property
    def clusters(self) -> Clusters:
        """The cluster of every symbol, as models are given them: padding and the begin symbol have one of their own."""
        _, groups = codebook(self.codes, self.coarse)
        if self.shuffled:
            groups = np.random.default_rng(0).permutation(groups)
        return (0,) * FIRST_CODE + tuple((groups + 1).tolist())


class Task(CodesTask):
    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task. Reads no user files."""
        super().__init__(config, **batching)

    def sources(self) -> Mapping[str, Source]:
        tokens = FIRST_CODE + closest(squares(), codebook(self.config.codes, self.config.coarse)[0])
        found = hashlib.sha256(np.append(tokens, self.config.clusters).astype(np.int32).tobytes()).hexdigest()
        self._fingerprint = {"config.task": f"tokens and clusters, sha256 {found}"}
        return {split: [example(row) for row in tokens[part]] for split, part in digits.SPLITS.items()}

    @property
    def fingerprint(self) -> dict[str, str]:
        """Other hardware may find another codebook."""
        return self._fingerprint


@functools.cache
def codebook(codes: int, coarse: int) -> tuple[Float[np.ndarray, "codes 4"], Int[np.ndarray, "codes"]]:
    """The codes and the cluster of each."""
    train = squares()[digits.SPLITS["train"]].reshape(-1, 4)
    first, second = jax.random.split(jax.random.key(0))
    centers = kmeans(train, codes, first, ROUNDS)
    return np.asarray(centers), closest(centers, kmeans(centers, coarse, second, ROUNDS))


def squares() -> Float[np.ndarray, "N 16 4"]:
    return digits.squares(digits.read()[0], 4)


def closest(x: Any, codes: Any) -> Int[np.ndarray, "*B"]:
    """Which of the codes (C, 4) is nearest to each x (*B, 4)."""
    return np.asarray(nearest(jnp.asarray(x), jnp.asarray(codes)[None]))[..., 0, 0]
