"""Tokens of a large codebook in two stages (Guo, Zhang and Shieh 2025, arXiv 2503.16194): coarse labels one after the
other, then all tokens at once, given the labels.

    p(v_1 ... v_n) = prod_t p(c_t | c_<t)  prod_t p(v_t | c_1 ... c_n),    c_t = c(v_t)

The first factor is a causal language model over the K clusters of the vocabulary, the second a bidirectional encoder of
the labels. The published clusters are those of k-means over the vectors of a codebook of images; here a task gives
them.

It is for tokens of a codebook. Given all labels, tokens are independent, so what a label leaves open must not depend on
neighbouring tokens. Words of a language are not like that.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqboat.choices import given
from seqboat.layers.embedding import TokenEmbedding
from seqboat.layers.initializers import truncated_normal
from seqboat.layers.router import ActivationStats
from seqboat.models.classifier import Output, is_real
from seqboat.models.encoder import Encoder, EncoderConfig, State
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.ops.clusters import Clusters, check_clusters, join, members


@dataclasses.dataclass(frozen=True)
class CoarseToFineConfig:
    """`encoder` is that of the first stage, causal; the second has `fine_layers` of the same layer that see both sides.
    `clusters` (V,) has the cluster of every symbol."""

    encoder: EncoderConfig
    vocabulary_size: int = given()
    clusters: tuple[int, ...] = given()
    fine_layers: int = 1

    def __post_init__(self):
        if self.fine_layers < 1:
            raise ValueError(f"fine_layers={self.fine_layers}: must be at least 1")
        if self.encoder.layer.layout.length:
            raise ValueError("fine_layers: config.mesh must not split sequences, whose labels are moved by one element")
        check_clusters(self.clusters, self.vocabulary_size)
        _ = self.coarse, self.fine  # which raise ValueError

    @property
    def coarse(self) -> LanguageModelConfig:
        """The first stage: a language model over the clusters."""
        return LanguageModelConfig(self.encoder, max(self.clusters) + 1)

    @property
    def fine(self) -> EncoderConfig:
        """The encoder of the second stage."""
        layer: Any = self.encoder.layer
        return dataclasses.replace(
            self.encoder, layer=dataclasses.replace(layer, causal=False), layers=self.fine_layers
        )

    def multiplications(self, length: int, rate: float) -> float:
        """Multiply-adds per element beside the encoder's: both heads, and the layers of the second stage."""
        layer: Any = self.encoder.layer
        heads = layer.features * (self.coarse.vocabulary_size + self.vocabulary_size)
        return heads + self.fine.layers * self.fine.layer.multiplications(length, rate)


class CoarseToFine(nn.Module):
    """symbols (B, L) and true lengths (B,) -> `Output` whose logits (B, L, V) at t are of the symbol at t + 1.

        logits_t(v) = log p(c(v) | c_0 ... c_t) + log softmax within c(v) of the scores s_{t+1}(v | c_1 ... c_{n-1})

    The sum of their exponentials is 1, and the sum of the logits of the true symbols 1 ... n-1 is the exact
    log-likelihood of these symbols given the first one, which marks the beginning. But scores have seen the label of
    the symbol itself: **the largest logit is not a prediction**, and an accuracy means nothing. The last logits of a
    sequence, of a symbol that is not there, are given an end marker. Padding may hold anything; a symbol outside the
    vocabulary, within the true length, makes its sequence's logits NaN.

    Stats are those of the coarse layers, then of the fine. `sample` draws sequences.
    """

    config: CoarseToFineConfig

    def setup(self):
        self.coarse = LanguageModel(self.config.coarse)
        nn.share_scope(self, self.coarse)  # embedding, encoder: as in a language model
        self.fine = Fine(self.config)

    def __call__(self, inputs: Int[Array, "B L"], lengths: Int[Array, "B"], train: bool = False) -> Output:
        labels = label(inputs, self.config.clusters)
        coarse = self.coarse(labels, lengths, train)
        inside = jnp.arange(labels.shape[1])[None] < lengths[:, None] - 1
        known = jnp.where(inside, jnp.roll(labels, -1, axis=1), max(self.config.clusters) + 1)
        x, stats = self.fine(known, lengths, train)
        both = ActivationStats(*(jnp.concatenate(pair) for pair in zip(coarse.layers, stats, strict=True)))
        return Output(join(coarse.logits, self.fine.scores(x), self.config.clusters), both)

    @nn.nowrap
    def initial_state(self, batch: int) -> State:
        """The initial state of N streams of labels. Raises ValueError for layers that cannot be streamed."""
        return LanguageModel(self.config.coarse, parent=None).initial_state(batch)

    def stream_labels(
        self, labels: Int[Array, "B L"], lengths: Int[Array, "B"], state: State
    ) -> tuple[Float[Array, "B L K"], State]:
        """Logits of the labels that follow, as `LanguageModel.stream`."""
        output, state = self.coarse.stream(labels, lengths, state)
        return output.logits, state

    def symbols_given(self, labels: Int[Array, "B N"]) -> Float[Array, "B N M"]:
        """The second stage alone: log p(v_t | c_1 ... c_N) of the symbols of c_t, in the order of
        `ops.clusters.members`, -inf behind the last; labels are those after the first symbol. Computes M scores per
        element, not V."""
        end = jnp.full((len(labels), 1), max(self.config.clusters) + 1, labels.dtype)
        known = jnp.concatenate([labels, end], axis=1)
        x, _ = self.fine(known, jnp.full(len(labels), known.shape[1]), False)
        own = jnp.asarray(members(self.config.clusters))[labels]
        scores = self.fine.scores(x[:, :-1], jnp.maximum(own, 0))
        return nn.log_softmax(jnp.where(own >= 0, scores, -jnp.inf))


class Fine(nn.Module):
    """The second stage: what is known of the symbols, labels and an end marker K, (B, L) -> features (B, L, D) and
    stats; and `scores` of symbols from features."""

    config: CoarseToFineConfig

    def setup(self):
        layer, outputs = self.config.encoder.layer, self.config.vocabulary_size
        self.embedding = TokenEmbedding(max(self.config.clusters) + 2, layer.features, layer.features**0.5)
        self.drop = nn.Dropout(layer.dropout)
        self.encoder = Encoder(self.config.fine)
        self.head = nn.Dense(outputs, kernel_init=truncated_normal())

    def __call__(
        self, known: Int[Array, "B L"], lengths: Int[Array, "B"], train: bool
    ) -> tuple[Float[Array, "B L D"], ActivationStats]:
        valid = is_real(lengths, known.shape[1], self.config.encoder.layer)
        x = self.drop(self.embedding(known), deterministic=not train)
        return self.encoder(jnp.where(valid[..., None], x, 0), valid, train)

    def scores(self, x: Float[Array, "B L D"], symbols: Int[Array, "B L M"] | None = None) -> Float[Array, "B L M"]:
        """x W + b, in float32: all V, or those of these symbols alone."""
        x = x.astype(jnp.float32)
        if symbols is None:
            return self.head(x)
        params = self.head.variables["params"]
        return jnp.einsum("bld,dblm->blm", x, params["kernel"][:, symbols]) + params["bias"][symbols]


def label(symbols: Int[Array, "*N"], clusters: Clusters) -> Int[Array, "*N"]:
    """c(v) of symbols, and -1 of those outside the vocabulary."""
    table = jnp.asarray(np.asarray(clusters, np.int32))
    return table.at[symbols].get(mode="fill", fill_value=-1, wrap_negative_indices=False)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def sample(
    model: CoarseToFine,
    variables: Mapping[str, Any],
    begin: Int[Array, "B"],
    key: Array,
    count: int,
    restrict: Callable[[Float[Array, "*B K"]], Float[Array, "*B K"]] = lambda logits: logits,
) -> Int[Array, "B N"]:
    """Draws `count` symbols for each of B sequences after their first symbol, from the model's own distribution, or
    from that of the logits of labels, and of the symbols of a label, as `restrict` changes them.

    One pass of the first stage per label, over K clusters, then one pass of the second over all labels. Raises
    ValueError for a model that cannot be streamed.
    """
    for_labels, for_symbols = jax.random.split(key)

    def step(before, key):
        labels, state = before
        logits, state = model.apply(variables, labels[:, None], jnp.ones_like(labels), state, method="stream_labels")
        drawn = jax.random.categorical(key, restrict(logits[:, 0])).astype(labels.dtype)
        return (drawn, state), drawn

    start = (label(begin, model.config.clusters), model.initial_state(len(begin)))
    labels = jax.lax.scan(step, start, jax.random.split(for_labels, count))[1].T
    symbols: Any = model.apply(variables, labels, method="symbols_given")
    choice = jax.random.categorical(for_symbols, restrict(symbols))
    return jnp.asarray(members(model.config.clusters))[labels, choice]


Config, Model = CoarseToFineConfig, CoarseToFine
