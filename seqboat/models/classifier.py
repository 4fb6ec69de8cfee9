"""Sequence classification: embed, encode, average over the true length, classify (Ren et al. 2023, section 4)."""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqboat.choices import check_choices, given
from seqboat.layers.block import BlockConfig
from seqboat.layers.embedding import LinearEmbedding, SinusoidalPosition, TokenEmbedding
from seqboat.layers.router import ActivationStats
from seqboat.models.encoder import Encoder, EncoderConfig
from seqboat.models.head import HeadConfig, check_head
from seqboat.models.heads import linear, mlp


class Output(NamedTuple):
    """`logits` (B, Y) or (B, L, V), float32, and the activation stats of every layer."""

    logits: Array
    layers: ActivationStats


def mean_over_length(
    x: Float[Array, "B L D"], valid: Bool[Array, "B L"], axis: str | None = None
) -> Float[Array, "B D"]:
    """The mean of each sequence's valid elements, in float32; 0 for an empty one. `axis` names the mesh axis over which
    sequences are split, if any."""
    total, count = jnp.where(valid[..., None], x, 0).astype(jnp.float32).sum(1), valid.sum(1)
    if axis:
        total, count = jax.lax.psum((total, count), axis)
    return total / jnp.maximum(count, 1)[:, None]


def is_real(lengths: Int[Array, "B"], length: int, layer: BlockConfig) -> Bool[Array, "B L"]:
    """Which elements of sequences of these true lengths are not padding; for this device's piece, if they are split."""
    return (jnp.arange(length) + layer.layout.start(length))[None] < lengths[:, None]


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """`vocabulary_size` None takes inputs of numbers (B, L, F), embedded by a Linear with `embedding_init`
    "projection", like every other, or "normal", as in the recipes for pixels and samples. `head` "mlp" is Linear(2D),
    dropout of the layers, GELU, Linear without bias, as in the recipes for Long Range Arena; "linear" is one affine
    map; the config of a file of `seqboat/models/heads` is that head."""

    encoder: EncoderConfig
    classes: int = given()
    vocabulary_size: int | None = given(default=None)
    embedding_init: Literal["projection", "normal"] = "projection"
    sinusoid: bool = False
    head: str | HeadConfig = "mlp"

    def __post_init__(self):
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: must be at least 1")
        if self.vocabulary_size is not None and self.vocabulary_size < 1:
            raise ValueError(f"vocabulary_size={self.vocabulary_size}: must be at least 1, or None for numbers")
        check_choices(self)
        check_head(self.head, "mlp", "linear")
        if getattr(self.head, "reads_inputs", False) and self.encoder.layer.layout.length:
            raise ValueError("head: this one reads whole sequences; take a config.mesh that does not split them")


class Classifier(nn.Module):
    """inputs (B, L) of symbols or (B, L, F) of numbers, and true lengths (B,) -> `Output` with logits (B, Y).

    Padding may hold anything. A symbol outside the vocabulary, within the true length, makes its sequence's logits NaN.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self, inputs: Int[Array, "B L"] | Float[Array, "B L F"], lengths: Int[Array, "B"], train: bool = False
    ) -> Output:
        config = self.config
        layer = config.encoder.layer
        valid = is_real(lengths, inputs.shape[1], layer)
        if config.vocabulary_size is None:
            # Masked before too: 0 times a NaN of padding is NaN in the gradient of the kernel.
            inputs = jnp.where(valid[..., None], inputs, 0)
            x = LinearEmbedding(layer.features, config.embedding_init, name="embedding")(inputs)
        else:
            x = TokenEmbedding(config.vocabulary_size, layer.features, name="embedding")(inputs)
        if config.sinusoid:
            x = SinusoidalPosition(layer.layout, name="position")(x)
        x = nn.Dropout(layer.dropout)(jnp.where(valid[..., None], x, 0), deterministic=not train)
        x, stats = Encoder(config.encoder, name="encoder")(x, valid, train)
        pooled = mean_over_length(x, valid, layer.layout.length)
        named = {"mlp": mlp.Config(dropout=layer.dropout), "linear": linear.Config()}
        head = named[config.head] if isinstance(config.head, str) else config.head
        read = {"inputs": inputs, "valid": valid} if head.reads_inputs else {}
        return Output(head.make(layer.features, config.classes, name="head")(pooled, train, **read), stats)


Config, Model = ClassifierConfig, Classifier
