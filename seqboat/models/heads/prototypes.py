"""Prototypes: a sequence is classified by its distances to learned cases (Li et al. 2018, arXiv 1710.04806).

    z = sigmoid(x W_z + b_z)          d_j = |z - p_j|^2          logits = d W

A term of the loss pulls every prototype to an example, so that it can be shown by one; another pulls every example to a
prototype; a decoder keeps in z what the inputs are.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqboat.choices import given
from seqboat.layers.initializers import truncated_normal
from seqboat.layers.taps import tap
from seqboat.layers.terms import term
from seqboat.models.head import Head, HeadConfig

MOST_NUMBERS = 4096  # that a decoder reconstructs
DECODER_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Config(HeadConfig):
    """`count` prototypes P of `size` numbers K.

    The weights of the terms, relative to the cross-entropy, each with the name of its term:
    `reconstruction` R: of inputs of numbers, the mean squared error over the numbers of a batch; of symbols, the
    divergence KL(q || r) in nats of their frequencies q in a sequence from the decoded ones r, the mean over sequences.
    0 makes no decoder.
    `nearest_example` R1 = mean_j min_i |p_j - z_i|^2: every prototype is near an example of the batch.
    `nearest_prototype` R2 = mean_i min_j |p_j - z_i|^2: every example is near a prototype.
    """

    reads_inputs: ClassVar[bool] = True

    vocabulary_size: int | None = given()
    length: int = given()
    channels: int | None = given(default=None)
    count: int = 15
    size: int = 16
    reconstruction: float = 0.05
    nearest_example: float = 0.05
    nearest_prototype: float = 0.05

    def __post_init__(self):
        for field in ("count", "size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        for field in ("reconstruction", "nearest_example", "nearest_prototype"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)}: must not be negative")
        if self.reconstruction and self.vocabulary_size is None:
            self._check_numbers()

    def _check_numbers(self) -> None:
        off = f"reconstruction={self.reconstruction:g}: must be 0, which makes no decoder,"
        if self.channels is None:
            raise ValueError(f"{off} for a task that does not tell the channels of its inputs")
        if self.length * self.channels > MOST_NUMBERS:
            sequence = f"{self.length} x {self.channels} numbers"
            raise ValueError(f"{off} for sequences of {sequence}: a decoder takes at most {MOST_NUMBERS}")

    @property
    def decoded(self) -> int:
        """How many numbers the decoder gives: those of a sequence, or one per symbol of the vocabulary."""
        return self.vocabulary_size or self.length * (self.channels or 0)

    def make(self, features: int, outputs: int, **owner: Any) -> Head:
        return Prototypes(self, outputs, **owner)


class Prototypes(Head):
    """x (..., D) -> d W, (..., Y), with squared distances d (..., P) to the prototypes, which are tapped, as is z.

    In training, with `inputs` and `valid` (B, L), it states the terms of `Config`. Sequences without elements, and
    padding, count in none of them.
    """

    config: Config
    outputs: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*N D"],
        train: bool = False,
        inputs: Int[Array, "B L"] | Float[Array, "B L F"] | None = None,
        valid: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "*N Y"]:
        config = self.config
        z = tap(self, "z", nn.sigmoid(nn.Dense(config.size, name="projection")(x.astype(jnp.float32))))
        prototypes = self.param("prototypes", nn.initializers.uniform(1.0), (config.count, config.size))
        distances = tap(self, "prototype_distances", squared_distances(z, prototypes))
        votes = self.param("votes", truncated_normal(), (config.count, self.outputs))
        decoded = self._decode(z) if config.reconstruction and (train or self.is_initializing()) else None
        if train and inputs is not None and valid is not None:
            self._terms(distances, valid.any(1))
            if decoded is not None:
                total, weight = reconstruction(decoded, inputs, valid)
                term(self, "reconstruction", config.reconstruction, total, weight)
        return distances @ votes

    def _decode(self, z: Float[Array, "*N K"]) -> Float[Array, "*N O"]:
        hidden = nn.gelu(nn.Dense(DECODER_WIDTH, name="decoder_hidden")(z), approximate=False)
        return nn.Dense(self.config.decoded, name="decoder")(hidden)

    def _terms(self, distances: Float[Array, "B P"], real: Bool[Array, "B"]) -> None:
        config, count = self.config, real.sum().astype(jnp.float32)
        to_example = jnp.where(real[:, None], distances, jnp.inf).min(0)
        to_example = jnp.where(count > 0, to_example, 0).sum()
        some = (count > 0).astype(
            jnp.float32
        )  # without a sequence, as in a small part of a batch, the mean is undefined
        term(self, "nearest_example", config.nearest_example, to_example, config.count * some)
        to_prototype = jnp.where(real, distances.min(1), 0).sum()
        term(self, "nearest_prototype", config.nearest_prototype, to_prototype, count)


def squared_distances(z: Float[Array, "*N K"], prototypes: Float[Array, "P K"]) -> Float[Array, "*N P"]:
    """|z - p_j|^2, by subtraction: |z|^2 - 2 z p_j + |p_j|^2 can be negative after rounding."""
    aligned = prototypes.reshape((1,) * (z.ndim - 1) + prototypes.shape)
    return jnp.square(z[..., None, :] - aligned).sum(-1)


def reconstruction(
    decoded: Float[Array, "B O"], inputs: Int[Array, "B L"] | Float[Array, "B L F"], valid: Bool[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A sum of losses and its weight. Numbers: squared errors of the valid ones, and how many there are. Symbols: the
    divergences of their frequencies from softmax(decoded), and how many sequences have elements."""
    if inputs.ndim == 3:
        there = valid[..., None]
        error = jnp.where(there, decoded.reshape(inputs.shape) - jnp.where(there, inputs, 0), 0)
        return jnp.square(error).sum(), inputs.shape[2] * valid.sum().astype(jnp.float32)
    q = frequencies(inputs, valid, decoded.shape[1])
    divergence = jax.scipy.special.xlogy(q, q) - q * nn.log_softmax(decoded)
    return divergence.sum(), valid.any(1).sum().astype(jnp.float32)


def frequencies(symbols: Int[Array, "B L"], valid: Bool[Array, "B L"], vocabulary_size: int) -> Float[Array, "B V"]:
    """The shares of the symbols of a vocabulary among the valid elements of each sequence; 0 without one. Symbols
    outside of the vocabulary are in no share."""
    known = valid & (symbols >= 0) & (symbols < vocabulary_size)
    add = lambda row, there: jnp.zeros(vocabulary_size).at[jnp.where(there, row, 0)].add(there.astype(jnp.float32))
    return jax.vmap(add)(symbols, known) / jnp.maximum(valid.sum(1), 1)[:, None]
