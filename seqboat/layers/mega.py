"""The MEGA block (Ma et al. 2022, arXiv 2209.10655): a moving average, attention in chunks, a feed-forward network.

Nothing is routed: all elements attend. Numbers of the published code: tests/parity/test_published_mega.py.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from seqboat.choices import check_choices
from seqboat.layers.block import Block, BlockConfig
from seqboat.layers.chunk_attention import ChunkAttention
from seqboat.layers.feed_forward import FeedForward
from seqboat.layers.mixer import MAX_SIZE, MixerConfig, check_size
from seqboat.layers.mixers import ema
from seqboat.layers.norm import NormKind
from seqboat.layers.router import ActivationStats
from seqboat.layers.taps import FEED_FORWARD, GAU, tap
from seqboat.ops.chunk_attention import ChunkMemory, initial_memory
from seqboat.ops.window import AttentionFunction
from seqboat.parallel.rules import SINGLE_DEVICE, Layout


@dataclasses.dataclass(frozen=True)
class LayerConfig(BlockConfig):
    """Letters are those of `seqboat`: D `features`, Z `key_size`, E `value_size`.

    Attention is within chunks of `chunk` elements, of which the last is filled up with padding; None attends over the
    whole sequence. Its bias is a table of distances ("relative", with a `chunk` of 2 C - 1 entries, else of 2
    `max_positions` - 1), or of two vectors ("rotary", `positions.rotary_bias`). `feed_forward_size` 0 omits the
    feed-forward network. `mixer` takes the place of the published moving average. `layout` as of
    `layers.config.LayerConfig`; sequences cannot be split.
    """

    features: int
    key_size: int
    value_size: int
    chunk: int | None = 128
    causal: bool = False
    attention_function: AttentionFunction = "softmax"
    position: Literal["relative", "rotary"] = "relative"
    max_positions: int = 1024
    feed_forward_size: int = 0
    mixer: MixerConfig = dataclasses.field(default_factory=ema.Config)
    norm: NormKind = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_affine: bool = True
    norm_counts_padding: bool = False
    layout: Layout = SINGLE_DEVICE
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_choices(self)
        if reason := self.mixer.width_refusal(self.features):
            raise ValueError(f"mixer.{reason}")
        for field in ("features", "key_size", "value_size", "max_positions"):
            check_size(field, getattr(self, field))
        if self.chunk is not None:
            check_size("chunk", self.chunk, ", or None for the whole sequence")
        if not 0 <= self.feed_forward_size <= MAX_SIZE:
            raise ValueError(f"feed_forward_size={self.feed_forward_size}: must be 0 (none) to {MAX_SIZE}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        if self.position == "rotary" and self.key_size % 2:
            raise ValueError(f"key_size={self.key_size}: rotary positions rotate pairs of channels, so it must be even")
        if self.layout.length:
            raise ValueError(f"chunk={self.chunk}: chunks are not split over devices; config.mesh must split batches")

    def block(self) -> type[Block]:
        return MegaLayer

    def sites(self) -> dict[str, tuple[str, ...]]:
        own = {"": ("pre_norm", "ssm_out", "m", "resid"), **GAU}
        return own | FEED_FORWARD if self.feed_forward_size else own

    def check_streaming(self) -> None:
        self.refuse_streams({"chunk": (self.chunk is not None, "it must be finite here: the chunk is kept as state")})
        if reason := self.mixer.stream_refusal():
            raise ValueError(f"mixer.{reason}")

    def describe(self, streaming: bool) -> str:
        chunks = "over the whole sequence" if self.chunk is None else f"in chunks of {self.chunk}"
        return f"MEGA, {self.attention_function} attention {chunks}, {self.mixer.describe(self.max_positions)}"

    def multiplications(self, length: int, rate: float) -> float:
        keys, own = min(self.chunk or length, length), self.key_size + self.value_size
        dense = self.features * (2 * self.features + own + 2 * self.value_size + 2 * self.feed_forward_size)
        return self.mixer.multiplications(self.features, self.causal) + dense + keys * own


class MegaState(NamedTuple):
    """The state of B streams: that of the mixer, and the chunk that each is in."""

    mixer: Any
    memory: ChunkMemory


class MegaLayer(Block):
    """x (B, L, D) -> (B, L, D), by the contract of `layers.block`; the stats have no modules.

        n = norm(x);  m = dropout(silu(mixer(n)));  u, h = attention(n, m)
        y = x + u * (dropout(h) - x);   then  y + dropout(silu(norm(y) W_1 + b_1) W_2 + b_2)

    With norms placed "post" each follows its sum instead.
    """

    config: LayerConfig

    @nn.nowrap
    def initial_state(self, batch: int) -> MegaState:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        config.check_streaming()
        mixer = config.mixer.make(config.causal, config.layout, parent=None)
        row = jax.ShapeDtypeStruct((1, config.features), dtype)
        memory = initial_memory(batch, config.chunk or 0, config.key_size, config.value_size, dtype)
        return MegaState(mixer.initial_state(batch, row), memory)

    @nn.compact
    def advance(
        self,
        x: Float[Array, "B L D"],
        valid: Bool[Array, "B L"],
        train: bool,
        state: MegaState | None,
        threshold: Array | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[ActivationStats, MegaState | None]]:
        config, state = self.config, jax.lax.stop_gradient(state)
        drop = lambda y: nn.Dropout(config.dropout)(y, deterministic=not train)
        norm = lambda placement, name, y: (
            config.make_norm(name)(y, valid, train) if config.norm_placement == placement else y
        )
        n = tap(self, "pre_norm", norm("pre", "norm", x))
        e, after = config.mixer.make(config.causal, config.layout, name="ssm").advance(n, valid, state and state.mixer)
        e = checkpoint_name(e, "ssm")
        e = tap(self, "ssm_out", e)
        m = tap(self, "m", drop(nn.silu(e)))
        attention = ChunkAttention(
            config.key_size,
            config.value_size,
            config.chunk,
            config.causal,
            config.attention_function,
            None if config.position == "rotary" else config.max_positions,
            name="gau",
        )
        u, h, memory = attention(n, m, valid, state and state.memory)
        y = norm("post", "norm", checkpoint_name(x + u * (drop(h) - x), "sum"))
        if config.feed_forward_size:
            rows = norm("pre", "feed_forward_norm", y).reshape(-1, config.features)
            network = FeedForward(config.feed_forward_size, dtype=jnp.dtype(config.dtype), name="feed_forward")
            y = norm("post", "feed_forward_norm", y + drop(network(rows).reshape(y.shape)))
        y = tap(self, "resid", y)
        none = jnp.zeros(0)
        stats = ActivationStats(none, none, none, valid.sum().astype(jnp.float32), none, none)
        return y, (stats, None if memory is None else MegaState(after, memory))
