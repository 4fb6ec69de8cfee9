"""A transformer block, on its own or as what the router activates.

By config alone it is a transformer (`activation` "always", `window_size` None), a sliding-window transformer (with a
window), sparse modular activation around whole transformer blocks ("learned"), or Mixture-of-Depths (`router.rule`
"capacity"; Raposo et al. 2024, arXiv 2404.02258).
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from seqboat.choices import check_choices
from seqboat.layers.block import Block, BlockConfig, check_routing
from seqboat.layers.config import blocks_here
from seqboat.layers.execution import Form, form_here
from seqboat.layers.mixer import check_size
from seqboat.layers.norm import NORMS
from seqboat.layers.router import Activation, ActivationStats, RouterConfig
from seqboat.layers.sparse_activation import Memories, SparseModularActivation
from seqboat.layers.taps import ROUTER, UNIT, tap
from seqboat.layers.windowed import WindowedModule
from seqboat.ops.blocks import Blocks, map_blocks
from seqboat.ops.packing import RowInfo
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend
from seqboat.parallel.rules import SINGLE_DEVICE, Layout

# The hidden width of the feed-forward network, 8/3 D, is rounded up to a multiple of this, so that meshes can split it.
HIDDEN_MULTIPLE = 8


def hidden_size(features: int) -> int:
    """8/3 D, with which three matrices have as many numbers as the two of a network of hidden width 4 D."""
    return -(-8 * features // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE


@dataclasses.dataclass(frozen=True)
class LayerConfig(BlockConfig):
    """A transformer block of width D, `features`, and H `heads`, each of an even width D / H.

    Every element attends to the `window_size` elements before it that are active, and to those after it unless
    `causal`; None means all. `activation`, `activation_rate`, `router`, `form`, `block_size`, `blocks_per_iteration`
    and `layout` are those of `layers.config.LayerConfig`. `dropout` is that of both sums. Norms are before the sums
    ("pre"): `norm` is their kind. Raises ValueError, by field, for what does not go together.
    """

    features: int
    heads: int = 4
    window_size: int | None = None
    causal: bool = False
    norm: Literal["rms", "layer", "scale"] = "rms"
    norm_affine: bool = True
    activation: Activation = "always"
    activation_rate: float | None = None
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    dropout: float = 0.0
    form: Form = "packed"
    block_size: int = 128
    blocks_per_iteration: int | None = None
    layout: Layout = SINGLE_DEVICE
    dtype: Literal["float32", "bfloat16"] = "float32"

    norm_placement: ClassVar[str] = "pre"  # type: ignore[misc]
    norm_counts_padding: ClassVar[bool] = False  # type: ignore[misc]

    def __post_init__(self):
        for field in ("features", "heads", "window_size", "block_size", "blocks_per_iteration"):
            if (value := getattr(self, field)) is not None:
                check_size(field, value, ", or None for no limit" if field == "window_size" else "")
        if self.features % (2 * self.heads):
            raise ValueError(
                f"heads={self.heads}: must divide features={self.features} into heads of an even width: "
                "rotary positions rotate pairs of channels"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        check_choices(self)
        check_routing(self.activation, self.activation_rate, self.router, split=bool(self.layout.length))
        if self.router.eviction_cost and self.window_size is None:
            raise ValueError("router.eviction_cost=True needs a window_size: without a window no key is evicted")
        if self.layout.length and self.window_size is None:
            raise ValueError(
                "window_size=None: must be finite if config.mesh splits sequences, to be exchanged between devices"
            )

    def sites(self) -> dict[str, tuple[str, ...]]:
        own = {"": ("m", "resid"), **UNIT}
        return own | ROUTER if self.activation == "learned" else own

    def check_streaming(self) -> None:
        fields = {
            "window_size": (self.window_size is not None, "it must be finite here: the window is kept as state"),
            "layout": (not self.layout.length, "pieces cannot be split; split batches over the mesh, not sequences"),
        }
        self.refuse_streams(fields)

    def block(self) -> type[Block]:
        return TransformerLayer

    def rate_control(self) -> tuple[float, bool] | None:
        return self.router.controlled

    def describe(self, streaming: bool) -> str:
        return (
            f"transformer, {self.heads} heads, window {self.window_size}, activation {self.activation}, "
            f"{form_here(self.form, streaming)} form of {blocks_here(self.blocks_per_iteration)} x {self.block_size} "
            "rows"
        )

    def multiplications(self, length: int, rate: float) -> float:
        keys = (1 if self.causal else 2) * (self.window_size or length) + 1
        unit = self.features * (4 * self.features + 3 * hidden_size(self.features) + 2 * keys)
        if self.activation != "learned":
            return unit * (1.0 if self.activation_rate is None else self.activation_rate)
        return 2 * self.features + rate * unit

    def make_unit(self, **owner: None) -> "TransformerUnit":
        """What the router activates; `parent=None` for an unattached module."""
        window = Window(self.window_size, self.causal, "softmax", "rotary")
        dtype = jnp.dtype(self.dtype)
        return TransformerUnit(
            self.features, self.heads, window, self.norm, self.norm_affine, self.dropout, dtype, name="unit", **owner
        )


class TransformerLayer(Block):
    """x (B, L, D) -> y = x + active * confidence * f(x), by the contract of `layers.block`; f is `TransformerUnit`."""

    # Flax: modules passed in keep their given names.
    preserve_adopted_names: ClassVar[bool] = True

    config: LayerConfig

    @nn.nowrap
    def initial_state(self, batch: int) -> Memories:
        """The initial state of B streams. Raises ValueError for a layer that cannot be streamed."""
        self.config.check_streaming()
        row = jax.ShapeDtypeStruct((1, self.config.features), jnp.dtype(self.config.dtype))
        return SparseModularActivation((self.config.make_unit(parent=None),), parent=None).initial_state(batch, row)

    @nn.compact
    def advance(
        self,
        x: Float[Array, "B L D"],
        valid: Bool[Array, "B L"],
        train: bool,
        state: Memories | None,
        threshold: Array | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[ActivationStats, Memories | None]]:
        config = self.config
        sparse = SparseModularActivation(
            (config.make_unit(),),
            config.router,
            activation=config.activation,
            activation_rate=config.activation_rate,
            form=config.form,
            block_size=config.block_size,
            blocks_per_iteration=blocks_here(config.blocks_per_iteration),
            layout=config.layout,
            name="sparse",
        )
        h, stats, after = sparse.advance(tap(self, "m", x), valid, train, jax.lax.stop_gradient(state), threshold)
        y = tap(self, "resid", checkpoint_name(x + h, "sum"))
        return y, (stats, after)


class TransformerUnit(WindowedModule):
    """Rows (T, D) -> what a transformer block adds to them, (T, D), attending within a window of activated rows:

        a = attend(q, k, v) W_o,    q, k, v = norm(x) W_q, W_k, W_v in H heads, q and k turned by rotary positions
        y = a + (silu(n W_g) * n W_u) W_d,    n = norm(x + a)

    As in Llama (Touvron et al. 2023, arXiv 2302.13971): RMS norm, SwiGLU of hidden width 8/3 D, no biases. Both terms
    have dropout if a "dropout" RNG is given.
    """

    features: int
    heads: int
    window: Window
    norm: str = "rms"
    norm_affine: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        # By the width that is read: numbers of a fixed deviation of 0.02 fit a width of 2500, and vanish in small ones.
        initial = nn.initializers.lecun_normal()
        dense = lambda size, name: nn.Dense(size, use_bias=False, dtype=self.dtype, kernel_init=initial, name=name)
        self.q, self.k, self.v = (dense(self.features, name) for name in ("query", "key", "value"))
        self.output = dense(self.features, "output")
        self.gate, self.up = (dense(hidden_size(self.features), name) for name in ("gate", "up"))
        self.down = dense(self.features, "down")
        self.norms = [NORMS[self.norm](affine=self.norm_affine, name=f"norm_{name}") for name in ("attention", "mlp")]
        self.drops = [nn.Dropout(self.dropout, name=f"drop_{name}") for name in ("attention", "mlp")]

    def projects_once(self) -> bool:
        return True

    def mixes_packed(self, every: bool) -> bool:
        return every

    def halo(self, length: int) -> tuple[int, int]:
        return self.window.halo(length)

    def context(self, x: Float[Array, "T D"], rows: RowInfo) -> dict:
        """Keys and values, (T, H, Z)."""
        normed = self._norm(0, x)
        k, v = self._turned(self.k(normed), rows), self._split(self.v(normed))
        # Rows that may not be read can hold anything, even NaN, and 0 * NaN is NaN.
        k, v = (jnp.where(rows.active[:, None, None], a, jnp.zeros((), a.dtype)) for a in (k, v))
        return {"k": tap(self, "k", k), "v": tap(self, "v", v)}

    def project(self, x: Float[Array, "T D"], rows: RowInfo) -> tuple[dict, dict]:
        return self.context(x, rows), {"q": self.query(x, rows)}

    def mix(
        self, x: Float[Array, "T D"], halo: dict, rows: RowInfo, halo_rows: RowInfo, own: dict | None = None
    ) -> Float[Array, "T D"]:
        q = own["q"] if own else self.query(x, rows)
        return self.finish(x, self._attend(q, halo, rows, halo_rows))

    def query(self, x: Float[Array, "T D"], rows: RowInfo) -> Float[Array, "T H Z"]:
        return tap(self, "q", self._turned(self.q(self._norm(0, x)), rows))

    def mix_packed(self, q: Float[Array, "T H Z"], halo: dict, rows: RowInfo, blocks: Blocks) -> Float[Array, "T H Z"]:
        each = lambda _, own, around: self._attend(own[0], around[0], own[1], around[1])
        return map_blocks(each, (), (q, rows), (halo, rows), blocks)

    def finish(self, x: Float[Array, "T D"], attended: Float[Array, "T H Z"]) -> Float[Array, "T D"]:
        a = self._drop(0, self.output(tap(self, "attended", attended).reshape(x.shape)))
        normed = self._norm(1, x + a.astype(x.dtype))
        hidden = tap(self, "feed_forward_hidden", nn.silu(self.gate(normed)) * self.up(normed))
        return tap(self, "unit_out", a + self._drop(1, tap(self, "feed_forward_out", self.down(hidden))))

    def _attend(self, q: Array, halo: dict, rows: RowInfo, halo_rows: RowInfo) -> Float[Array, "T H Z"]:
        one_head = functools.partial(attend, self.window, None)
        each: Any = jax.vmap(one_head, in_axes=(1, 1, 1, None, None), out_axes=1)
        return each(q, halo["k"], halo["v"], rows, halo_rows)

    def _turned(self, x: Float[Array, "T D"], rows: RowInfo) -> Float[Array, "T H Z"]:
        return jax.vmap(self.window.apply_rotary, in_axes=(1, None), out_axes=1)(self._split(x), rows)

    def _split(self, x: Float[Array, "T D"]) -> Float[Array, "T H Z"]:
        return x.reshape(len(x), self.heads, -1)

    def _norm(self, which: int, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.norms[which](x[None], jnp.ones((1, len(x)), bool), False)[0]

    def _drop(self, which: int, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.drops[which](x, deterministic=not self.has_rng("dropout"))
