"""What mixers of one recurrence per direction share: parameters, and the sum, of one direction or both."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Complex, Float

from seqboat.ops import recurrence
from seqboat.parallel import sequence

Tree = Any


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
