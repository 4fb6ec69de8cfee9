"""A causal language model over symbols (Ren et al. 2023, section 4.3)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from seqboat.choices import given
from seqboat.layers.embedding import TokenEmbedding
from seqboat.models.classifier import Output, is_real
from seqboat.models.encoder import Encoder, EncoderConfig, State
from seqboat.models.head import HeadConfig, check_head


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A causal encoder over a vocabulary of V symbols. `head` "tied" is the embedding; the config of a file of
    `seqboat/models/heads` is that head."""

    encoder: EncoderConfig
    vocabulary_size: int = given()
    head: str | HeadConfig = "tied"

    def __post_init__(self):
        if not self.encoder.layer.causal:
            raise ValueError("causal=False: a language model needs causal layers")
        if self.encoder.layer.norm == "batch":
            raise ValueError("norm='batch': its statistics look ahead; a language model needs layer, scale or rms")
        if self.vocabulary_size < 1:
            raise ValueError(f"vocabulary_size={self.vocabulary_size}: must be at least 1")
        check_head(self.head, "tied")
        if isinstance(self.head, HeadConfig) and self.head.reads_inputs:
            raise ValueError(f"head.name={self.head.name!r}: it is for classifiers, since it reads whole sequences")

    def multiplications(self, length: int, rate: float) -> float:
        """Multiply-adds per element beside the encoder's: those of a product with V outputs."""
        return float(self.encoder.layer.features * self.vocabulary_size)


class LanguageModel(nn.Module):
    """tokens (B, L) and true lengths (B,) -> `Output` whose logits (B, L, V) at t are of the symbol at t + 1.

    logits = norm(encode(sqrt(D) E[tokens])) E^T, with one table E ~ N(0, 1/D) and no bias, unless `head` is another
    one, which reads the norm. Padding may hold anything; logits of a sequence are NaN at least from its first symbol
    outside the vocabulary.

    Streams of any length are processed piece by piece, with constant memory and constant cost per token, and the same
    results as in one piece:

        state = model.initial_state(batch)
        output, state = model.apply(variables, tokens, lengths, state, method="stream")
    """

    config: LanguageModelConfig

    def __call__(self, inputs: Int[Array, "B L"], lengths: Int[Array, "B"], train: bool = False) -> Output:
        return self._advance(inputs, lengths, train, None)[0]

    @nn.nowrap
    def initial_state(self, batch: int) -> State:
        """The initial state of N streams. Raises ValueError for a model that cannot be streamed."""
        return Encoder(self.config.encoder, parent=None).initial_state(batch)

    def stream(self, inputs: Array, lengths: Array, state: State, train: bool = False) -> tuple[Output, State]:
        """The output for the first `lengths` (B,) of the symbols (B, L) of B streams, 0..L of each, and the state
        after.

        Equal to `__call__` on the full streams, up to rounding, however they are cut. No gradient flows into the state:
        training by pieces is truncated backpropagation, although attention reaches into earlier pieces. Raises
        ValueError for a model that cannot be streamed, a state of another model, and other shapes. Compiled programs
        cannot check values: lengths outside 0..L are clipped.
        """
        if inputs.ndim != 2 or inputs.shape[1] < 1 or lengths.shape != inputs.shape[:1]:
            raise ValueError(f"expected symbols (B, L) and lengths (B,), not {inputs.shape} and {lengths.shape}")
        return self._advance(inputs, lengths, train, state)

    @nn.compact
    def _advance(self, inputs: Array, lengths: Array, train: bool, state: Any) -> tuple[Output, Any]:
        layer = self.config.encoder.layer
        embedding = TokenEmbedding(self.config.vocabulary_size, layer.features, layer.features**0.5, name="embedding")
        valid = is_real(lengths, inputs.shape[1], layer)
        x = nn.Dropout(layer.dropout)(embedding(inputs), deterministic=not train)
        x = jnp.where(valid[..., None], x, 0)
        x, stats, state = Encoder(self.config.encoder, name="encoder").advance(x, valid, train, state)
        if isinstance(self.config.head, HeadConfig):
            head = self.config.head.make(layer.features, self.config.vocabulary_size, name="head")
            return Output(head(x, train), stats), state
        return Output(embedding.attend(x), stats), state


Config, Model = LanguageModelConfig, LanguageModel
