"""The SeqBoat layer (Ren et al. 2023, arXiv 2306.11197, section 3)."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from seqboat.layers.block import Block
from seqboat.layers.config import ACCELERATOR_BLOCKS, LayerConfig
from seqboat.layers.initializers import truncated_normal
from seqboat.layers.router import ActivationStats
from seqboat.layers.sparse_activation import Memories, SparseModularActivation
from seqboat.layers.taps import tap
from seqboat.modules import Modules, check_modules

__all__ = ["ACCELERATOR_BLOCKS", "SAVED_NAMES", "LayerConfig", "LayerState", "SeqBoatLayer"]

# Values saved for the backward pass instead of recomputed, by their names in `jax.ad_checkpoint`.
SAVED_NAMES = ("ssm", "sum", "result", "codes")


class LayerState(NamedTuple):
    """A layer's state for B streams: that of its state space model, and a memory per module."""

    ssm: Any
    memories: Memories


class SeqBoatLayer(Block):
    """x (B, L, D) -> (B, L, D), and the stats of its configurator's decisions.

        m = dropout(silu(SSM(norm(x))))            norm here if placed "pre"
        h = sum over modules of active * confidence * f(m)
        y = silu(x + m W + b + h)                  then norm if placed "post"

    Dropout applies to h, or to (m W + b + h) in a causal layer. `modules` replaces the config's own list. `advance`
    resumes from the state after earlier pieces of the same streams, and gives the same results as the full streams
    in one piece.
    """

    # Flax: modules passed in keep their given names.
    preserve_adopted_names: ClassVar[bool] = True

    config: LayerConfig
    modules: Modules | None = None

    def __post_init__(self):
        if self.modules is not None:
            check_modules(self.modules)
        super().__post_init__()

    @nn.nowrap
    def initial_state(self, batch: int) -> LayerState:
        """The initial state of B streams. Raises ValueError for a layer that cannot be streamed."""
        config = self.config
        config.check_streaming(own_modules=self.modules is None)
        row = jax.ShapeDtypeStruct((1, config.features), jnp.dtype(config.dtype))
        modules = config.make_modules(parent=None) if self.modules is None else self.modules
        return LayerState(
            config.make_mixer(parent=None).initial_state(batch, row),
            SparseModularActivation(modules, parent=None).initial_state(batch, row),
        )

    @nn.compact
    def advance(
        self,
        x: Float[Array, "B L D"],
        valid: Bool[Array, "B L"],
        train: bool,
        state: LayerState | None,
        threshold: Array | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[ActivationStats, LayerState | None]]:
        """The layer over pieces of streams, valid elements first, and the state after each piece's last valid element.

        No gradient flows into the state. With state None the sequences are complete, and no state is kept. `threshold`
        is that of `RateControl`.
        """
        config, state = self.config, jax.lax.stop_gradient(state)
        drop = lambda y: nn.Dropout(config.dropout)(y, deterministic=not train)
        residual = x
        if config.norm_placement == "pre":
            x = config.make_norm("norm")(x, valid, train)
        x = tap(self, "pre_norm", x)
        e, after = config.make_mixer().advance(x, valid, state and state.ssm)
        e = checkpoint_name(e, "ssm")
        e = tap(self, "ssm_out", e)
        m = tap(self, "m", drop(nn.silu(e)))
        skip = nn.Dense(config.features, dtype=m.dtype, kernel_init=truncated_normal(), name="skip_projection")(m)
        skip = tap(self, "skip", skip)
        sparse = SparseModularActivation(
            config.make_modules() if self.modules is None else self.modules,
            config.router,
            activation="always" if config.activation == "never" else config.activation,
            activation_rate=config.activation_rate,
            form=config.form,
            block_size=config.block_size,
            blocks_per_iteration=config.blocks,
            layout=config.layout,
            name="sparse",
        )
        h, stats, memories = sparse.advance(m, valid, train, state and state.memories, threshold)
        y = nn.silu(checkpoint_name(residual + (drop(skip + h) if config.causal else skip + drop(h)), "sum"))
        if config.norm_placement == "post":
            y = config.make_norm("norm")(y, valid, train)
        y = tap(self, "resid", y)
        return y, (stats, None if after is None or memories is None else LayerState(after, memories))
