"""What mixers of one recurrence per direction share: parameters and the sum of one direction or both; and what those
of a linear recurrence share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from seqboat.layers.mixer import Mixer, MixerConfig, Tree
from seqboat.ops import recurrence
from seqboat.parallel import sequence


def parameter(mixer: Any, name: str, init: Callable[..., Array], shape: tuple[int, ...]) -> Array:
    """A parameter of a module with the field `causal`. Unless it is causal, two are drawn, on a leading axis of 2: for
    the past, and for the future."""
    both = lambda key: jax.vmap(lambda key: init(key, shape))(jax.random.split(key))
    return mixer.param(name, init, shape) if mixer.causal else mixer.param(name, both)


def run(
    advance: Callable[..., tuple[Array, Tree]],
    params: Tree,
    x: Float[Array, "B L D"],
    valid: Bool[Array, "B L"],
    state: Tree | None,
    causal: bool,
) -> tuple[Float[Array, "B L D"], Tree | None]:
    """`Mixer.advance` by `advance(params, x, valid, state, reverse) -> (y, state)`.

    With `reverse` it runs from the last valid element to the first; with state None it starts from zeros.
    """
    if causal:
        y, after = advance(params, x, valid, state, False)
        return y.astype(x.dtype), None if state is None else after

    def direction(i: int) -> Array:
        return advance(jax.tree.map(lambda p: p[i], params), x, valid, None, bool(i))[0]

    return (direction(0) + direction(1)).astype(x.dtype), None


@dataclasses.dataclass(frozen=True)
class LinearConfig(MixerConfig):
    """Of a diagonal linear recurrence with constant decays: `state_size` P complex values in all."""

    state_size: int = 64

    def split_refusal(self) -> None:
        return None

    def describe(self, length: int) -> str:
        return f"{self.name} by {recurrence.choose('auto')}"

    def multiplications(self, features: int, causal: bool) -> int:
        return (1 if causal else 2) * 4 * self.state_size * (features + 1)


class Linear(Mixer):
    """The mixer of a `LinearConfig`. `axis` names the mesh axis over which sequences are split, if any."""

    config: Any
    causal: bool
    axis: str | None = None

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> Complex[Array, "B P"]:
        """The state of B streams at their start."""
        return jnp.zeros((batch, self.config.state_size), jnp.complex64)


def linear(
    decay: Complex[Array, "P"],
    input: Complex[Array, "B L P"],
    valid: Bool[Array, "B L"],
    state: Complex[Array, "B P"] | None,
    reverse: bool,
    axis: str | None,
) -> tuple[Complex[Array, "B L P"], Complex[Array, "B P"] | None]:
    """`ops.recurrence.linear`; if complete sequences are split over the mesh axis `axis`, without the last state."""
    if axis and state is None:
        return sequence.linear(decay, input, valid, axis, reverse), None
    return recurrence.linear(decay, input, valid, state, reverse=reverse)
