"""The damped EMA as a layer, holding the parameters of `ops.ema`."""

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from seqboat.layers.initializers import alternating, truncated_normal
from seqboat.ops import ema
from seqboat.parallel import sequence


class EMA(nn.Module):
    """x (B, L, D) -> the damped average of every element's past, and of its future unless causal, plus omega x.

    Elements that are not `valid` enter the average as zeros. `axis` names the mesh axis over which sequences are split,
    if any. Initialisation is that of the published model: delta and alpha ~ N(0, 0.2^2), beta ~ alternating +-1 plus
    N(0, 0.02^2), gamma and omega ~ N(0, 1), truncated at two standard deviations. `advance` resumes from an earlier
    state.
    """

    state_size: int
    causal: bool
    truncation: int | None = None
    method: ema.Method = "auto"
    axis: str | None = None

    def __call__(self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.advance(x, valid, None)[0]

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> ema.State:
        """The state of B streams at their start; `row` (1, D) is an example of the input."""
        return ema.initial_state(batch, row.shape[1], self.state_size, self.truncation, row.dtype)

    @nn.compact
    def advance(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], state: ema.State | None
    ) -> tuple[Float[Array, "B L D"], ema.State | None]:
        """The average over pieces of streams starting from `state`, if any, and the state after their last valid
        elements."""
        width = x.shape[-1]
        shape = (width if self.causal else 2 * width, self.state_size)
        params = ema.EMAParams(
            delta=self.param("delta", truncated_normal(0.2), shape),
            alpha=self.param("alpha", truncated_normal(0.2), shape),
            beta=self.param("beta", alternating(), shape),
            gamma=self.param("gamma", truncated_normal(1.0), shape),
            omega=self.param("omega", truncated_normal(1.0), (width,)),
        )
        if state is not None:
            state, y = ema.stream(params, state, x, valid.sum(1))
            return y, state
        if self.axis:
            return sequence.convolve(params, x, valid, self.axis, self.method), None
        return ema.convolve(params, x, valid, truncation=self.truncation, method=self.method), None
