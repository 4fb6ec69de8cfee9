"""Classification of pairs of documents by one shared encoder (Tay et al. 2021, the retrieval task of LRA)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from seqboat.choices import given
from seqboat.layers.embedding import TokenEmbedding
from seqboat.models.classifier import Output, is_real, mean_over_length
from seqboat.models.encoder import Encoder, EncoderConfig
from seqboat.models.heads import mlp


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """`head_size` is the width between the pair's features and the classes; 256 in the published recipe."""

    encoder: EncoderConfig
    classes: int = given()
    vocabulary_size: int = given()
    head_size: int = 256

    def __post_init__(self):
        for field in ("classes", "vocabulary_size", "head_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")


class DualEncoder(nn.Module):
    """inputs (B, L, 2) of symbols, with the two documents in the last axis, and true lengths (B, 2) -> logits (B, Y).

    With e the mean of an encoded document over its length, the features of a pair are
    [e2; e1; e1 * e2; e1 - e2]  (4D), then Linear, dropout, GELU, Linear (Ren et al. 2023, section 4.1; Ma et al. 2023).
    Padding may hold anything; a symbol outside the vocabulary makes its pair's logits NaN.
    """

    config: RetrievalConfig

    @nn.compact
    def __call__(self, inputs: Int[Array, "B L 2"], lengths: Int[Array, "B 2"], train: bool = False) -> Output:
        config = self.config
        layer = config.encoder.layer
        tokens = jnp.moveaxis(inputs, 2, 1).reshape(2 * inputs.shape[0], inputs.shape[1])  # (2B, L), pair by pair
        valid = is_real(lengths.reshape(-1), tokens.shape[1], layer)
        x = TokenEmbedding(config.vocabulary_size, layer.features, name="embedding")(tokens)
        x = nn.Dropout(layer.dropout)(jnp.where(valid[..., None], x, 0), deterministic=not train)
        x, stats = Encoder(config.encoder, name="encoder")(x, valid, train)
        pooled = mean_over_length(x, valid, layer.layout.length)
        first, second = jnp.moveaxis(pooled.reshape(-1, 2, x.shape[-1]), 1, 0)
        pair = jnp.concatenate([second, first, first * second, first - second], axis=-1)
        head = mlp.Config(config.head_size, layer.dropout).make(pair.shape[-1], config.classes, name="head")
        return Output(head(pair, train), stats)


Config, Model = RetrievalConfig, DualEncoder
