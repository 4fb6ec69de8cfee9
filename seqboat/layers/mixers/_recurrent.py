"""What the recurrent cells of `ops.cells` share as mixers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.mixer import Mixer, Tree
from seqboat.layers.mixers import _directions as directions

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
            return directions.parameter(self, name, lambda key, shape: self.adjust(name, uniform(key, shape)), shape)

        params = {name: parameter(name, shape) for name, shape in self.shapes(x.shape[-1]).items()}
        return directions.run(self._run, params, x, valid, state, self.causal)

    @nn.nowrap
    def _run(self, params: Params, x: Array, valid: Array, state: Tree | None, reverse: bool) -> tuple[Array, Tree]:
        if state is None:
            state = self.initial_state(len(x), jax.ShapeDtypeStruct((1, x.shape[-1]), x.dtype))
        # Time first, as the scan reads it: x is D wide, z several times that.
        z = x.swapaxes(0, 1) @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)[None, None]
        return self.cell(params, z.swapaxes(0, 1), valid, state, reverse)
