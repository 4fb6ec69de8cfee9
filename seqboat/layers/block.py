"""The contract of a block: what an `Encoder` stacks, with its config. One file in `seqboat/layers` has both."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from seqboat.layers.norm import NORMS, NormKind
from seqboat.layers.router import ActivationStats, RouterConfig
from seqboat.parallel.rules import Layout


class Block(nn.Module):
    """x (B, L, D) -> y (B, L, D), and the stats of its decisions. Subclasses define

    `initial_state(batch)`: the state of B streams, a tree of arrays (B, ...). Not traced by Flax (`nn.nowrap`).
    `advance(x, valid, train, state, threshold) -> (y, (stats, state))`: x and y (B, L, D), `router.ActivationStats`,
    and the state after pieces of streams, or None with state None. `threshold` is that of a
    `router.RateControl`, or None.
    """

    config: Any

    def __call__(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool = False
    ) -> tuple[Float[Array, "B L D"], ActivationStats]:
        y, (stats, _) = self.advance(x, valid, train, None)
        return y, stats

    def initial_state(self, batch: int) -> Any:
        raise NotImplementedError

    def advance(self, x: Array, valid: Array, train: bool, state: Any, threshold: Array | None = None) -> Any:
        raise NotImplementedError


class BlockConfig:
    """The base of a block's `LayerConfig`, a frozen dataclass with at least these fields. `block()` gives the `Block`
    that is made of such a config."""

    features: int
    causal: bool
    norm: NormKind
    norm_placement: str
    norm_affine: bool
    norm_counts_padding: bool
    dropout: float
    dtype: str
    layout: Layout

    def block(self) -> type[Block]:
        raise NotImplementedError

    def sites(self) -> dict[str, tuple[str, ...]]:
        """The names of what its layer taps (`layers.taps`), by the path, within the layer, of the module that does; ""
        is the layer itself."""
        raise NotImplementedError

    def check_streaming(self) -> None:
        """Raise ValueError unless such a layer can process streams piece by piece, exactly and in constant memory."""
        raise NotImplementedError

    def refuse_streams(self, fields: Mapping[str, tuple[bool, str]]) -> None:
        """Raise ValueError for the first field, of every block's and of these, that is not fine in streams: by its
        name, whether it is fine, and why not."""
        common = {
            "causal": (self.causal, "the layer looks ahead; train with causal=True"),
            "norm": (self.norm != "batch", "it uses statistics of whole batches; use layer, scale or rms"),
        }
        for field, (fine, why) in {**common, **fields}.items():
            if not fine:
                raise ValueError(f"{field}={getattr(self, field)!r} cannot be streamed: {why}")

    def describe(self, streaming: bool) -> str:
        """The layer in one line, for the start of a run; `streaming`: of one that carries state."""
        raise NotImplementedError

    def multiplications(self, length: int, rate: float) -> float:
        """Per element of sequences of this length, at a rate of activation where a router decides."""
        raise NotImplementedError

    def rate_control(self) -> tuple[float, bool] | None:
        """The activation rate asked for, and whether it is a ceiling; None if none is."""
        return None

    def make_norm(self, name: str) -> nn.Module:
        extra: dict[str, Any] = {}
        if self.norm == "batch":
            extra = {"axes": self.layout.data, "count_padding": self.norm_counts_padding}
        return NORMS[self.norm](affine=self.norm_affine, name=name, **extra)


def check_routing(activation: str, rate: float | None, router: RouterConfig, split: bool) -> None:
    """Raise ValueError, by field, unless a layer of this activation can have this rate and router. `split`: its
    sequences are, over a mesh."""
    fixed = activation in ("random", "strided")
    if fixed and (rate is None or not 0 < rate <= 1):
        raise ValueError(f"activation_rate={rate}: must be above 0 and at most 1 if activation={activation!r}")
    if not fixed and rate is not None:
        raise ValueError(f"activation_rate={rate}: only activation='random' and 'strided' have a given rate")
    for field, unset in (("target_rate", None), ("rule", "margin")):
        if (value := getattr(router, field)) != unset and activation != "learned":
            raise ValueError(f"router.{field}={value!r}: activation={activation!r} has no router")
    if split and router.rule == "capacity":
        raise ValueError(
            "router.rule='capacity': must be 'margin' if config.mesh splits sequences, to rank no elements"
        )
