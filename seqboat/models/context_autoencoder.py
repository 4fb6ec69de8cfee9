"""Pretraining without labels: a context autoencoder (Chen et al. 2022, arXiv 2202.03026) of sequences.

    z_v = Encoder(embed(visible) + position)
    z_m = Regressor: a mask token at every masked position attends to [z_v; z_m]
    x_m = Decoder(z_m + position): self-attention over the masked elements alone

The encoder sees the visible elements alone, and the decoder does not see them: what it needs must come through the
regressor, in the space of the encoder. The term "align" asks for that, as the mean of |z_m - stop(Encoder(masked))|^2,
of the same encoder on the masked elements alone. (The published target is a copy of the encoder, made at every step.)
Symbols are reconstructed by cross-entropy and numbers by squared error; the published targets are the codes of a
tokenizer of images.

Without a regressor it is a masked autoencoder (He et al. 2022, arXiv 2111.06377): the decoder sees the visible elements
and a mask token at the others.

`embedding`, `position` and `encoder` have the names that they have in a `Classifier` with a sinusoid.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqboat.choices import given
from seqboat.layers.cross_attention import CrossAttention
from seqboat.layers.embedding import LinearEmbedding, SinusoidalPosition, TokenEmbedding
from seqboat.layers.initializers import truncated_normal
from seqboat.layers.norm import LayerNorm
from seqboat.layers.terms import term
from seqboat.models.classifier import Output, is_real
from seqboat.models.encoder import Encoder, EncoderConfig
from seqboat.ops.positions import sinusoid


@dataclasses.dataclass(frozen=True)
class ContextAutoencoderConfig:
    """`vocabulary_size` V of symbols, or None for numbers; `channels` of the inputs, the mask among them; `share` of
    the elements is masked. `regressor_layers` 0 is a masked autoencoder, with `align` 0. `align` is the coefficient of
    the term; `regressor_heads` are those of regressor and decoder."""

    encoder: EncoderConfig
    vocabulary_size: int | None = given()
    channels: int | None = given()
    share: float = given()
    regressor_layers: int = 2
    decoder_layers: int = 1
    regressor_heads: int = 4
    align: float = 2.0

    def __post_init__(self):
        layer = self.encoder.layer
        for field, least in (("regressor_layers", 0), ("decoder_layers", 1), ("regressor_heads", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least {least}")
        if layer.features % self.regressor_heads:
            raise ValueError(f"regressor_heads={self.regressor_heads}: must divide features={layer.features}")
        if not self.align >= 0:
            raise ValueError(f"align={self.align}: must not be negative")
        if self.align and not self.regressor_layers:
            raise ValueError(f"align={self.align}: must be 0 with regressor_layers=0, which predict no latents")
        if layer.causal:
            raise ValueError("causal=True: must be False: masked elements are predicted from both sides")
        if layer.layout.length:
            raise ValueError("share: config.mesh must not split sequences, whose visible elements are gathered")


class Slots(NamedTuple):
    """Elements of sequences, gathered: their positions `at` (B, S), which slots are `valid` (B, S), and the
    sinusoids of the positions, `place` (B, S, D)."""

    at: Array
    valid: Array
    place: Array

    def take(self, x: Float[Array, "B L D"]) -> Float[Array, "B S D"]:
        """The elements of x; 0 in slots that are not valid."""
        return jnp.where(self.valid[..., None], jnp.take_along_axis(x, self.at[..., None], 1), 0)

    def spread(self, y: Float[Array, "B S D"], length: int) -> Float[Array, "B L D"]:
        """The inverse of `take`: 0 at all other positions."""
        rows = jnp.arange(len(y))[:, None]
        place = jnp.where(self.valid, self.at, length)
        return jnp.zeros((len(y), length, y.shape[-1]), y.dtype).at[rows, place].set(y, mode="drop")


def gather_slots(chosen: Bool[Array, "B L"], size: int, width: int) -> Slots:
    """The first `size` chosen elements of every sequence, in order."""
    index = jnp.argsort(~chosen, axis=1, stable=True)[:, :size]
    table = jnp.asarray(sinusoid(chosen.shape[1], width))
    return Slots(index, jnp.arange(size)[None] < chosen.sum(1, keepdims=True), table[index])


def masked_count(share: float, length: int) -> int:
    """How many elements of a sequence are masked."""
    return math.floor(share * length)


class ContextAutoencoder(nn.Module):
    """inputs (B, L, 2) of symbols or (B, L, F + 1) of numbers, the last column 1 where an element is masked, and true
    lengths (B,) -> `Output` with logits (B, L, V) or reconstructions (B, L, F), 0 at elements that are not masked.

    At most a share of L is masked, rounded down, and of a sequence with a true length of n at most the same of n.
    """

    config: ContextAutoencoderConfig

    @nn.compact
    def __call__(
        self, inputs: Int[Array, "B L 2"] | Float[Array, "B L C"], lengths: Int[Array, "B"], train: bool = False
    ) -> Output:
        config, layer, length = self.config, self.config.encoder.layer, inputs.shape[1]
        valid, mask = is_real(lengths, length, layer), inputs[..., -1] > 0
        count = masked_count(config.share, length)
        visible = gather_slots(valid & ~mask, length - count, layer.features)
        masked = gather_slots(valid & mask, max(1, count), layer.features)
        x = self._embed(inputs[..., :-1], valid)
        drop = nn.Dropout(layer.dropout, deterministic=not train)
        encoder = Encoder(config.encoder, name="encoder")
        z, stats = encoder(drop(visible.take(x)), visible.valid, train)

        token = self.param("mask_token", nn.initializers.normal(0.02), (layer.features,))
        tokens = jnp.broadcast_to(token, (*masked.at.shape, layer.features))
        if config.regressor_layers:
            latents = Regressor(config, name="regressor")(tokens, z, masked, visible, train)
            if config.align and self.is_mutable_collection("terms"):
                target = jax.lax.stop_gradient(encoder(masked.take(x), masked.valid)[0])
                distance = jnp.square(latents - target).mean(-1)
                term(self, "align", config.align, (masked.valid * distance).sum(), masked.valid.sum())
            decoded = Decoder(config, name="decoder")(latents, masked, train)
        else:
            both = Slots(*(jnp.concatenate(pair, 1) for pair in zip(visible, masked, strict=True)))
            decoded = Decoder(config, name="decoder")(jnp.concatenate([z, tokens], 1), both, train)
            decoded = decoded[:, z.shape[1] :]
        outputs = (config.channels or 0) - 1 if config.vocabulary_size is None else config.vocabulary_size
        logits = nn.Dense(outputs, kernel_init=truncated_normal(), name="logits")(decoded.astype(jnp.float32))
        return Output(masked.spread(logits, length), stats)

    def _embed(self, values: Array, valid: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        config, layer = self.config, self.config.encoder.layer
        if config.vocabulary_size is None:
            values = jnp.where(valid[..., None], values, 0)
            x = LinearEmbedding(layer.features, name="embedding")(values)
        else:
            x = TokenEmbedding(config.vocabulary_size, layer.features, name="embedding")(values[..., 0])
        return SinusoidalPosition(layer.layout, name="position")(x)


class Regressor(nn.Module):
    """From queries (B, M, D) at masked positions and the latents (B, S, D) of visible ones to latents (B, M, D).

    Every block's keys and values are [visible; queries]; positions are added to queries and keys alone.
    """

    config: ContextAutoencoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B M D"], z: Float[Array, "B S D"], masked: Slots, visible: Slots, train: bool
    ) -> Float[Array, "B M D"]:
        around = jnp.concatenate([visible.place, masked.place], 1)
        valid = jnp.concatenate([visible.valid, masked.valid], 1)
        for index in range(self.config.regressor_layers):
            values = jnp.concatenate([z.astype(x.dtype), x], 1)
            x = _block(self.config, index)(x, x + masked.place, values + around, values, valid, train)
        return x


class Decoder(nn.Module):
    """Latents (B, S, D) of slots -> (B, S, D), normalised: their positions are added, and they attend to each other."""

    config: ContextAutoencoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], slots: Slots, train: bool) -> Float[Array, "B S D"]:
        x = x + slots.place
        for index in range(self.config.decoder_layers):
            x = _block(self.config, index)(x, x, x, x, slots.valid, train)
        return LayerNorm(name="final_norm")(x, slots.valid, train)


def _block(config: ContextAutoencoderConfig, index: int) -> CrossAttention:
    return CrossAttention(config.regressor_heads, config.encoder.layer.dropout, name=f"attention_{index}")


Config, Model = ContextAutoencoderConfig, ContextAutoencoder
