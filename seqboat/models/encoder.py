"""A stack of blocks, of SeqBoat layers for one, as one scan, so that compile time does not grow with depth."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.choices import check_choices
from seqboat.layers.block import BlockConfig
from seqboat.layers.router import ActivationStats, RateControl
from seqboat.layers.seqboat import SAVED_NAMES

Remat = Literal["none", "selective", "layer"]
Tree = Any
# The state of every layer. Leaves have a leading axis of streams: see `reset` and `fork` in `layers.streaming`.
State = tuple[Tree, ...]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """`layers` blocks of one `layer` config. `remat` selects what a layer stores for the backward pass: "none"
    everything, "selective" what is expensive to recompute (`layers.seqboat.SAVED_NAMES`), "layer" only its input.
    `final_norm_affine` False omits scale and offset in the norm after pre-norm layers."""

    layer: BlockConfig
    layers: int
    remat: Remat = "selective"
    final_norm_affine: bool = True

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"layers={self.layers}: must be at least 1")
        check_choices(self)


class Encoder(nn.Module):
    """x (B, L, D) -> (B, L, D) and the stacked stats of all layers, each with a leading axis of layers.

    A final norm follows if norms are placed before the layers. Padding is not masked in the output.
    `advance` resumes from the state after earlier pieces of the same streams.
    """

    config: EncoderConfig

    def __call__(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool = False
    ) -> tuple[Float[Array, "B L D"], ActivationStats]:
        return self.advance(x, valid, train, None)[:2]

    @nn.nowrap
    def initial_state(self, batch: int) -> State:
        """The initial state of N streams. Raises ValueError for layers that cannot be streamed."""
        layer: Any = self.config.layer.block()(self.config.layer, parent=None)
        return tuple(layer.initial_state(batch) for _ in range(self.config.layers))

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool, state: State | None
    ) -> tuple[Float[Array, "B L D"], ActivationStats, State | None]:
        """The encoder over pieces of streams, and the state after them (`layers.block`).

        Raises ValueError for a state of another model.
        """
        if state is not None:
            self._check(state, len(x))
        x = x.astype(jnp.dtype(self.config.layer.dtype))
        apart = not isinstance(self.get_variable("params", "layers", {}), Mapping)
        control = self._rate_control()
        threshold = control() if control else None
        x, stats, state = (self._one_by_one if apart else self._in_one_scan)(x, valid, train, state, threshold)
        if control and train and not self.is_initializing():
            control.update(stats)
        if self.config.layer.norm_placement == "pre":
            layer: Any = self.config.layer
            final = dataclasses.replace(layer, norm_affine=self.config.final_norm_affine)
            x = final.make_norm("final_norm")(x, valid, train)
        return x, stats, state

    def _rate_control(self) -> RateControl | None:
        asked = self.config.layer.rate_control()
        return None if asked is None else RateControl(*asked, self.config.layer.layout.data, name="rate")

    def _in_one_scan(self, x: Array, valid: Array, train: bool, state: State | None, threshold: Any):
        config, layer = self.config, self.config.layer.block()
        if config.layer.layout.axes:  # a layer's parameters are gathered while it runs
            layer = nn.map_variables(layer, "params", trans_in_fn=config.layer.layout.gather, methods=["advance"])
        if config.remat != "none":
            keep = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
            policy = keep if config.remat == "selective" else None
            layer = nn.remat(layer, static_argnums=(3,), prevent_cse=False, policy=policy, methods=["advance"])
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "batch_stats": 0, "edits": 0, "taps": 0, "terms": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
            length=config.layers,
            methods=["advance"],
        )
        stacked = None if state is None else _stack(state)
        x, (stats, after) = scanned(config.layer, name="layers").advance(x, valid, train, stacked, threshold)
        return x, stats, None if after is None else _unstack(after)

    def _one_by_one(self, x: Array, valid: Array, train: bool, state: State | None, threshold: Any):
        """With `separate` parameters: nothing is copied out of a stack, but compile time grows with depth."""
        if train:
            raise ValueError("train=True: parameters unstacked by `separate` are for evaluation only")
        collections: dict[str, Any] = {
            name: self.get_variable(name, "layers") for name in ("params", "batch_stats", "edits")
        }
        sowing = [name for name in ("taps", "terms") if self.is_mutable_collection(name)]
        outcomes, found, block = [], [], self.config.layer.block()
        for i in range(self.config.layers):
            variables = {name: layers[i] for name, layers in collections.items() if layers is not None}
            (x, outcome), sown = block(self.config.layer, parent=None).apply(
                variables,
                x,
                valid,
                False,
                None if state is None else state[i],
                threshold,
                method="advance",
                mutable=sowing,
            )
            outcomes.append(outcome)
            found.append(sown)
        stats, after = zip(*outcomes, strict=True)
        for name, stacked in _stack(found).items():
            self.put_variable(name, "layers", stacked)
        return x, _stack(stats), None if state is None else after

    def _check(self, state: State, batch: int) -> None:
        wanted = jax.eval_shape(lambda: self.initial_state(batch))
        shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        if shapes(state) != shapes(wanted):
            raise ValueError(
                f"the state is not one of {batch} streams of this model: create it by initial_state({batch}) or fork"
            )


def separate(variables: Mapping[str, Tree]) -> dict[str, Tree]:
    """The variables with separate arrays per layer, in a tuple instead of a stack.

    A decoding step reads all parameters once; from a stack it would first copy them. `advance` and its callers accept
    both forms; for evaluation only.
    """
    return {
        name: _unstack(tree) if name == "layers" else separate(tree) if isinstance(tree, Mapping) else tree
        for name, tree in variables.items()
    }


def _stack(trees: Any) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(tree: Tree) -> tuple[Tree, ...]:
    count = len(jax.tree.leaves(tree)[0])
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count))
