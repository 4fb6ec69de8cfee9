"""Clips: a convolutional encoder of every frame, then a sequence model of the frames in time, trained as one (LRCN;
Donahue et al. 2015, arXiv 1411.4389).

    u_t = relu(K_n * ... relu(K_1 * frame_t))           3 x 3 kernels with stride 2, * with zeros around the image
    x_t = W vec(u_t) + b,    h = Encoder(x_1, ..., x_L)
    "clip": logits = head(mean_t h_t)    "frame": logits_t = head(h_t)

The published frame encoder is a pretrained network for large photographs, and its sequence model an LSTM; here the
first is small and starts from the seed, and the second is any block or mixer.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqboat.choices import check_choices, given
from seqboat.layers.initializers import deep, truncated_normal
from seqboat.models.classifier import Output, is_real, mean_over_length
from seqboat.models.encoder import Encoder, EncoderConfig, State
from seqboat.models.head import HeadConfig, check_head
from seqboat.models.heads import linear, mlp

KERNEL, STRIDE = 3, 2


@dataclasses.dataclass(frozen=True)
class FramesConfig:
    """`frame` is (height, width, colours) of the images, whose product is `channels`, the numbers per frame; `filters`
    are those of the convolutions, first to last. `answer` "clip" gives one answer, "frame" one for every frame. `head`
    as in a classifier: "linear", "mlp" or the config of a head."""

    encoder: EncoderConfig
    classes: int = given()
    channels: int = given()
    answer: Literal["clip", "frame"] = given(default="clip")
    frame: tuple[int, int, int] = (16, 16, 1)
    filters: tuple[int, ...] = (16, 32)
    head: str | HeadConfig = "linear"

    def __post_init__(self):
        layout = self.encoder.layer.layout
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: must be at least 1")
        check_choices(self)
        if len(self.frame) != 3 or min(self.frame) < 1:
            raise ValueError(f"frame={self.frame}: must be height, width and colours of at least 1")
        if (size := math.prod(self.frame)) != self.channels:
            raise ValueError(f"frame={self.frame}: has {size} numbers, and a frame of this task {self.channels}")
        if not self.filters or min(self.filters) < 1:
            raise ValueError(f"filters={self.filters}: must be one or more numbers of at least 1")
        check_head(self.head, "linear", "mlp")
        if self.answer == "frame" and layout.length:
            raise ValueError("answer='frame': reads whole clips; take a config.mesh that does not split sequences")
        if getattr(self.head, "reads_inputs", False) and (self.answer == "frame" or layout.length):
            raise ValueError(
                "head: this one reads whole clips, not split by config.mesh, and gives one answer per clip"
            )

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the image, and after each convolution: half, rounded up."""
        found = [self.frame[:2]]
        for _ in self.filters:
            found.append((-(-found[-1][0] // STRIDE), -(-found[-1][1] // STRIDE)))
        return tuple(found)

    def multiplications(self, length: int, rate: float) -> float:
        """Multiply-adds per frame beside the encoder's: the frame encoder's, those of zeros around the image too."""
        inputs, sizes = (self.frame[2], *self.filters), self.sizes()[1:]
        convolutions = zip(sizes, inputs, self.filters, strict=False)
        total = sum(math.prod(size) * KERNEL**2 * before * after for size, before, after in convolutions)
        return float(total) + math.prod(sizes[-1]) * self.filters[-1] * self.encoder.layer.features


class FrameEncoder(nn.Module):
    """Frames (B, L, H W C), rows of pixels with their colours last -> x (B, L, D), of every frame alone, float32.

    Kernels start with variance 2 / inputs, as before a ReLU (He et al. 2015, arXiv 1502.01852). The last map is the
    projection of a `LinearEmbedding`.
    """

    frame: tuple[int, int, int]
    filters: tuple[int, ...]
    features: int

    @nn.compact
    def __call__(self, inputs: Float[Array, "B L F"]) -> Float[Array, "B L D"]:
        batch, length = inputs.shape[:2]
        x = inputs.reshape(batch * length, *self.frame)
        kernel, bias = deep("he", "relu")
        for index, filters in enumerate(self.filters):
            x = nn.relu(Convolution(filters, kernel, bias, name=f"convolution_{index}")(x))
        x = x.reshape(batch, length, math.prod(x.shape[1:]))
        return nn.Dense(self.features, kernel_init=truncated_normal(), name="projection")(x)


class Convolution(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, F), rounded up: a kernel of 3 x 3 with stride 2, zeros around the image.

    The values of `nn.Conv`, by one product with the nine shifted images side by side: a training step of gliding
    digits took a ninth of the CPU time so on x86-64 with jax 0.10.2, though the convolutions alone took as long.
    """

    filters: int
    kernel_init: Any
    bias_init: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        kernel = self.param("kernel", self.kernel_init, (KERNEL, KERNEL, x.shape[-1], self.filters))
        zeros = jax.lax.padtype_to_pads(x.shape[1:3], (KERNEL, KERNEL), (STRIDE, STRIDE), "SAME")
        x = jnp.pad(x, ((0, 0), *zeros, (0, 0)))
        height, width = (size - KERNEL + 1 for size in x.shape[1:3])
        shifts = itertools.product(range(KERNEL), repeat=2)
        parts = [x[:, down : down + height : STRIDE, right : right + width : STRIDE] for down, right in shifts]
        shifted = jnp.concatenate(parts, -1)
        bias = self.param("bias", self.bias_init, (self.filters,))
        return shifted @ kernel.reshape(-1, self.filters) + bias[None, None, None]


class Frames(nn.Module):
    """inputs (B, L, H W C) of frames, and true lengths (B,) -> `Output` with logits (B, Y), or (B, L, Y) with `answer`
    "frame". Padding may hold anything; logits of padding are anything finite.

    A causal model that answers for every frame reads streams of any length piece by piece, with the same results:

        state = model.initial_state(batch)
        output, state = model.apply(variables, frames, lengths, state, method="stream")
    """

    config: FramesConfig

    def __call__(self, inputs: Float[Array, "B L F"], lengths: Int[Array, "B"], train: bool = False) -> Output:
        return self._advance(inputs, lengths, train, None)[0]

    @nn.nowrap
    def initial_state(self, batch: int) -> State:
        """The initial state of B streams. Raises ValueError for a model that cannot be streamed."""
        if self.config.answer != "frame":
            raise ValueError("answer='clip' cannot be streamed: it is of a whole clip; take 'frame'")
        return Encoder(self.config.encoder, parent=None).initial_state(batch)

    def stream(self, inputs: Array, lengths: Array, state: State, train: bool = False) -> tuple[Output, State]:
        """The output for the first `lengths` (B,) of the frames (B, L, F) of B streams, 0..L of each, and the state
        after. Equal to `__call__` on the full streams, up to rounding, however they are cut.

        Raises ValueError for a state of another model, and other shapes.
        """
        if inputs.ndim != 3 or inputs.shape[1] < 1 or lengths.shape != inputs.shape[:1]:
            raise ValueError(f"expected frames (B, L, F) and lengths (B,), not {inputs.shape} and {lengths.shape}")
        return self._advance(inputs, lengths, train, state)

    @nn.compact
    def _advance(self, inputs: Array, lengths: Array, train: bool, state: Any) -> tuple[Output, Any]:
        config, layer = self.config, self.config.encoder.layer
        if inputs.shape[2:] != (config.channels,):
            raise ValueError(f"inputs {inputs.shape}: expected (B, L, {config.channels}), frames of {config.frame}")
        valid = is_real(lengths, inputs.shape[1], layer)
        # Masked before too: 0 times a NaN of padding is NaN in the gradient of a kernel.
        inputs = jnp.where(valid[..., None], inputs, 0)
        x = FrameEncoder(config.frame, config.filters, layer.features, name="embedding")(inputs)
        x = nn.Dropout(layer.dropout)(jnp.where(valid[..., None], x, 0), deterministic=not train)
        x, stats, state = Encoder(config.encoder, name="encoder").advance(x, valid, train, state)
        if config.answer == "clip":
            x = mean_over_length(x, valid, layer.layout.length)
        named = {"linear": linear.Config(), "mlp": mlp.Config(dropout=layer.dropout)}
        head = named[config.head] if isinstance(config.head, str) else config.head
        read = {"inputs": inputs, "valid": valid} if head.reads_inputs else {}
        return Output(head.make(layer.features, config.classes, name="head")(x, train, **read), stats), state


Config, Model = FramesConfig, Frames
