"""A causal language model over symbols (Ren et al. 2023, section 4.3)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from seqboat.layers.embedding import TokenEmbedding
from seqboat.models.classifier import Output, is_real
from seqboat.models.encoder import Encoder, EncoderConfig


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A causal encoder over a vocabulary of V symbols; the embedding is tied to the output."""

    encoder: EncoderConfig
    vocabulary_size: int

    def __post_init__(self):
        if not self.encoder.layer.causal:
            raise ValueError("causal=False: a language model needs causal layers")
        if self.encoder.layer.norm == "batch":
            raise ValueError("norm='batch': its statistics look ahead; a language model needs layer, scale or rms")
        if self.vocabulary_size < 1:
            raise ValueError(f"vocabulary_size={self.vocabulary_size}: must be at least 1")


class LanguageModel(nn.Module):
    """tokens (B, L) and true lengths (B,) -> `Output` whose logits (B, L, V) at t are of the symbol at t + 1.

    logits = norm(encode(sqrt(D) E[tokens])) E^T, with one table E ~ N(0, 1/D) and no bias.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, inputs: Int[Array, "B L"], lengths: Int[Array, "B"], train: bool = False) -> Output:
        layer = self.config.encoder.layer
        embedding = TokenEmbedding(self.config.vocabulary_size, layer.features, layer.features**0.5, name="embedding")
        valid = is_real(lengths, inputs.shape[1], layer)
        x = nn.Dropout(layer.dropout)(embedding(inputs), deterministic=not train)
        x = jnp.where(valid[..., None], x, 0)
        x, stats = Encoder(self.config.encoder, name="encoder")(x, valid, train)
        return Output(embedding.attend(x), stats)
