"""What the recurrent cells of `ops.cells` share as mixers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.mixer import Mixer, Tree

Params = dict[str, Array]


class Recurrent(Mixer):
    """x (B, L, D) -> y (B, L, D): a cell over z = x W + b, computed for all elements in one product.

    Parameters are uniform in +-1/sqrt(D) at the start, as PyTorch's are. Unless `causal` they have a leading axis of 2,
    and the second set runs from the last element to the first. Subclasses define `shapes(D)`: those of W (`kernel`), b
    (`bias`) and the cell's own; `cell(params, z, valid, state, reverse)`; and `adjust`, where a parameter starts
    elsewhere.
    """

    causal: bool

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def cell(self, params: Params, z: Array, valid: Array, state: Tree, reverse: bool) -> tuple[Array, Tree]:
        raise NotImplementedError

    @nn.nowrap
    def adjust(self, name: str, values: Array) -> Array:
        """The initial values of a parameter, from uniform ones."""
        return values

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> Tree:
        """Zeros (B, D), for B streams; `row` (1, D) is an example of the input."""
        return jnp.zeros((batch, row.shape[1]), jnp.float32)

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: Tree | None
    ) -> tuple[Float[Array, "B L D"], Tree | None]:
        """The outputs for pieces of streams starting from `state`, if any, and the state after their last valid
        elements."""
        bound = x.shape[-1] ** -0.5

        def parameter(name, shape):
            uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
            init = lambda key, shape: self.adjust(name, uniform(key, shape))
            return self.param(name, init, shape if self.causal else (2, *shape))

        params = {name: parameter(name, shape) for name, shape in self.shapes(x.shape[-1]).items()}
        row = jax.ShapeDtypeStruct((1, x.shape[-1]), x.dtype)
        start = self.initial_state(x.shape[0], row) if state is None else state
        if self.causal:
            y, after = self._direction(params, x, valid, start, reverse=False)
            return y, None if state is None else after
        past, future = (jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(2))
        y = self._direction(past, x, valid, start, reverse=False)[0]
        return y + self._direction(future, x, valid, start, reverse=True)[0], None

    def _direction(self, params: Params, x: Array, valid: Array, state: Tree, reverse: bool) -> tuple[Array, Tree]:
        # Time first, as the scan reads it: x is D wide, z several times that.
        z = x.swapaxes(0, 1) @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)[None, None]
        return self.cell(params, z.swapaxes(0, 1), valid, state, reverse)
