"""What a SeqBoat layer is made of, and which combinations there are."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqboat.choices import check_choices
from seqboat.layers.block import Block, BlockConfig, check_routing
from seqboat.layers.execution import Form, form_here
from seqboat.layers.feed_forward import FeedForward, FeedForwardActivation
from seqboat.layers.gau import GatedAttentionUnit
from seqboat.layers.mixer import MAX_SIZE, Mixer, MixerConfig
from seqboat.layers.mixers import ema
from seqboat.layers.norm import NormKind
from seqboat.layers.router import RouterConfig
from seqboat.layers.taps import FEED_FORWARD, GAU, ROUTER
from seqboat.ops.window import AttentionFunction, PositionKind, Window
from seqboat.ops.window_attention import kernel_is_fast, kernel_notice, kernel_unsupported_reason
from seqboat.parallel.rules import SINGLE_DEVICE, Layout

SIZES = ("features", "key_size", "value_size", "max_positions", "block_size", "blocks_per_iteration")
# Blocks of active rows that an accelerator computes at once: 32 x 128 rows fill it, and a look at their number, some 20
# microseconds, is little beside them. Argued from these numbers, not measured.
ACCELERATOR_BLOCKS = 32


def blocks_here(asked: int | None) -> int:
    """`blocks_per_iteration`; where that is None, what fills this backend."""
    if asked is not None:
        return asked
    return 1 if jax.default_backend() == "cpu" else ACCELERATOR_BLOCKS


@dataclasses.dataclass(frozen=True)
class LayerConfig(BlockConfig):
    """One SeqBoat layer. Letters are those of `seqboat`: D `features`, Z `key_size`, E `value_size`. `mixer` carries
    the sequence: the paper's EMA, or another of `seqboat/layers/mixers`.

    `window_size` None attends over all activated elements (SeqBoat-full). `activation` "learned" is SeqBoat, "always"
    computes attention everywhere, "never" has neither attention nor configurator, "random" and "strided" compute it at
    a share `activation_rate` of all positions, whatever the elements are (`router.FixedPattern`).
    `feed_forward_size` 0 omits the sparsely activated feed-forward network, `attention` False the GAU; its
    `feed_forward_activation` "selu" comes with its own initialiser and dropout (`layers.selu`). `max_positions` sizes
    the "relative" table.
    The packed form computes blocks of `block_size` rows, `blocks_per_iteration` at once (None is 1 on a CPU and
    ACCELERATOR_BLOCKS elsewhere), and attends within them (`attention_method` "blocks") or by a Pallas kernel
    ("pallas"; interpreted and slow on a CPU); "auto" is what was measured to be faster (`method`). `layout` gives the
    mesh axes over which batches and sequences are split, for steps under shard_map or pmap.

    Reference only, for tests and comparisons with the published code; no recipe sets them: `attention`, `form`,
    `mixer.method`, `norm_affine`, `norm_counts_padding`, `hidden_dropout`, `attention_dropout`, `router.initial_bias`.
    """

    features: int
    key_size: int
    value_size: int
    window_size: int | None = 128
    causal: bool = False
    attention: bool = True
    attention_function: AttentionFunction = "softmax"
    position: PositionKind = "relative"
    max_positions: int = 1024
    feed_forward_size: int = 0
    feed_forward_activation: FeedForwardActivation = "silu"
    mixer: MixerConfig = dataclasses.field(default_factory=ema.Config)
    norm: NormKind = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_affine: bool = True
    norm_counts_padding: bool = False
    layout: Layout = SINGLE_DEVICE
    activation: Literal["learned", "always", "never", "random", "strided"] = "learned"
    activation_rate: float | None = None
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    form: Form = "packed"
    block_size: int = 128
    blocks_per_iteration: int | None = None
    attention_method: Literal["auto", "blocks", "pallas"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for field in SIZES:
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field}={value}: must be at least 1")
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"window_size={self.window_size}: must be at least 1, or None for no limit")
        for field in (*SIZES, "window_size", "feed_forward_size"):
            if (getattr(self, field) or 0) > MAX_SIZE:
                raise ValueError(f"{field}={getattr(self, field)}: must be at most {MAX_SIZE}")
        for field in ("dropout", "hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be in [0, 1)")
        check_choices(self)
        if self.feed_forward_size < 0:
            raise ValueError(f"feed_forward_size={self.feed_forward_size}: must be 0 (none) or more")
        if self.position == "slot" and self.window_size is None:
            raise ValueError("position='slot' needs a window_size: its table covers the distances within a window")
        if self.router.eviction_cost and self.window_size is None:
            raise ValueError("router.eviction_cost=True needs a window_size: without a window no key is evicted")
        if self.position == "rotary" and self.key_size % 2:
            raise ValueError(f"key_size={self.key_size}: rotary positions rotate pairs of channels, so it must be even")
        check_routing(self.activation, self.activation_rate, self.router, split=bool(self.layout.length))
        if reason := self.mixer.width_refusal(self.features):
            raise ValueError(f"mixer.{reason}")
        if self.attention_method == "pallas" and (refusal := self._kernel_refusal()):
            raise ValueError(f"attention_method='pallas': {refusal}")
        if self.layout.length:
            self._check_split()

    def _kernel_refusal(self) -> str | None:
        """Why no kernel computes such a layer on this backend; None if one does."""
        if self.form == "dense":
            return "only form='packed' has a kernel"
        if self.attention_dropout:
            return f"the kernel has no attention_dropout={self.attention_dropout}; use 'blocks'"
        reason = kernel_unsupported_reason(self.make_window())
        return f"{reason}; use 'blocks'" if reason else None

    @property
    def method(self) -> Literal["blocks", "pallas"]:
        """The form of attention that is computed here. "auto" takes the kernel on one GPU of compute capability 8.0 or
        later, for a window with a size and without a bias table: what was faster there (docs/performance.md)."""
        if self.attention_method != "auto":
            return self.attention_method
        measured = self.window_size is not None and self.position in ("none", "rotary") and self.layout == SINGLE_DEVICE
        return "pallas" if measured and kernel_is_fast() and not self._kernel_refusal() else "blocks"

    def _check_split(self) -> None:
        if reason := self.mixer.split_refusal():
            raise ValueError(f"mixer.{reason}")
        if self.window_size is None:
            raise ValueError(
                "window_size=None: must be finite if config.mesh splits sequences, to be exchanged between devices"
            )

    def check_streaming(self, own_modules: bool = True) -> None:
        """Raise ValueError unless such a layer can process streams piece by piece, exactly and in constant memory."""
        fields = {
            "window_size": (
                self.window_size is not None or not (own_modules and self.attention) or self.activation == "never",
                "it must be finite here: the window is kept as state",
            ),
            "activation": (
                self.activation not in ("random", "strided") or (own_modules and self.attention),
                "positions are counted by the attention's memory; use it with attention=True",
            ),
            "layout": (not self.layout.length, "pieces cannot be split; split batches over the mesh, not sequences"),
        }
        self.refuse_streams(fields)
        if reason := self.mixer.stream_refusal():
            raise ValueError(f"mixer.{reason}")

    @property
    def blocks(self) -> int:
        return blocks_here(self.blocks_per_iteration)

    def make_window(self) -> Window:
        return Window(self.window_size, self.causal, self.attention_function, self.position)

    def block(self) -> type[Block]:
        from seqboat.layers.seqboat import SeqBoatLayer  # which has such a config

        return SeqBoatLayer

    def sites(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {"": ("pre_norm", "ssm_out", "m", "skip", "resid")}
        for has, own in ((self.attention, GAU), (self.feed_forward_size, FEED_FORWARD)):
            if has and self.activation != "never":
                found |= own | (ROUTER if self.activation == "learned" else {})
        return found

    def rate_control(self) -> tuple[float, bool] | None:
        return self.router.controlled

    def describe(self, streaming: bool) -> str:
        notice = kernel_notice() if self.method == "pallas" else None
        return (
            f"window {self.window_size}, {self.attention_function} attention, activation {self.activation}, "
            f"{form_here(self.form, streaming)} form of {self.blocks} x {self.block_size} rows, attention by "
            f"{self.method}{f' ({notice})' if notice else ''}, {self.mixer.describe(self.max_positions)}"
        )

    def multiplications(self, length: int, rate: float) -> float:
        keys = (1 if self.causal else 2) * (self.window_size or length) + 1
        attention = self.features * (self.key_size + 3 * self.value_size) + keys * (self.key_size + self.value_size)
        active = self.attention * attention + 2 * self.features * self.feed_forward_size
        if self.activation != "learned":
            rate = {"always": 1.0, "never": 0.0}.get(self.activation, self.activation_rate or 0.0)
        mixer = self.mixer.multiplications(self.features, self.causal)
        return mixer + self.features**2 + 2 * self.features + rate * active

    def make_mixer(self, **owner: None) -> Mixer:
        """The mixer; `parent=None` for an unattached module. Its parameters keep the name "ssm"."""
        return self.mixer.make(self.causal, self.layout, name="ssm", **owner)

    def make_modules(self, **owner: None) -> tuple[nn.Module, ...]:
        """The modules that the configurator chooses from; `parent=None` for unattached modules."""
        modules: list[nn.Module] = []
        dtype = jnp.dtype(self.dtype)
        if self.activation != "never" and self.attention:
            gau = GatedAttentionUnit(
                features=self.features,
                key_size=self.key_size,
                value_size=self.value_size,
                window=self.make_window(),
                max_positions=self.max_positions,
                hidden_dropout=self.hidden_dropout,
                attention_dropout=self.attention_dropout,
                kernel=self.method == "pallas",
                dtype=dtype,
                name="gau",
                **owner,
            )
            modules.append(gau)
        if self.activation != "never" and self.feed_forward_size:
            size, activation = self.feed_forward_size, self.feed_forward_activation
            network = FeedForward(size, self.hidden_dropout, dtype, activation, "m", name="feed_forward", **owner)
            modules.append(network)
        return tuple(modules)
