"""A causal language model over symbols (Ren et al. 2023, section 4.3)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from seqboat.layers.embedding import TokenEmbedding
from seqboat.models.classifier import Output, is_real
from seqboat.models.encoder import Encoder, EncoderConfig, State


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

    logits = norm(encode(sqrt(D) E[tokens])) E^T, with one table E ~ N(0, 1/D) and no bias. Padding may hold anything;
    logits of a sequence with a symbol outside the vocabulary are NaN, from there on at least.

    Streams of any length are read piece by piece, in constant memory and at a constant cost an element, each piece as
    if all before it were there:

        state = model.initial_state(batch)
        output, state = model.apply(variables, tokens, lengths, state, method="stream")
    """

    config: LanguageModelConfig

    def __call__(self, inputs: Int[Array, "B L"], lengths: Int[Array, "B"], train: bool = False) -> Output:
        return self._advance(inputs, lengths, train, None)[0]

    @nn.nowrap
    def initial_state(self, batch: int) -> State:
        """The state of so many streams that begin. Raises ValueError for a model that cannot be streamed."""
        return Encoder(self.config.encoder, parent=None).initial_state(batch)

    def stream(self, inputs: Array, lengths: Array, state: State, train: bool = False) -> tuple[Output, State]:
        """The output for the next `lengths` (B,) of the symbols (B, L) of B streams, 0..L of each, and the state after.

        Equal to `__call__` on the whole streams, up to rounding, whatever the pieces. No gradient goes back into the
        state: training by pieces is truncated backpropagation, while attention reaches into earlier ones. Raises
        ValueError for a model that cannot be streamed, for a state of another one, and for other shapes. What compiled
        programs cannot check are values: lengths outside 0..L count as the nearest of them.
        """
        if inputs.ndim != 2 or inputs.shape[1] < 1 or lengths.shape != inputs.shape[:1]:
            raise ValueError(f"symbols (B, L) and lengths (B,) are wanted, not {inputs.shape} and {lengths.shape}")
        return self._advance(inputs, lengths, train, state)

    @nn.compact
    def _advance(self, inputs: Array, lengths: Array, train: bool, state: Any) -> tuple[Output, Any]:
        layer = self.config.encoder.layer
        embedding = TokenEmbedding(self.config.vocabulary_size, layer.features, layer.features**0.5, name="embedding")
        valid = is_real(lengths, inputs.shape[1], layer)
        x = nn.Dropout(layer.dropout)(embedding(inputs), deterministic=not train)
        x = jnp.where(valid[..., None], x, 0)
        x, stats, state = Encoder(self.config.encoder, name="encoder").advance(x, valid, train, state)
        return Output(embedding.attend(x), stats), state
