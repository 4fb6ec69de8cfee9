"""Long convolutions of a sequence with one kernel a channel, in one direction or both."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jaxtyping import Array, Float

# Rows of a piece of a transpose: it stays in the cache, and writes whole cache lines.
PIECE = 128


def direct_convolve(
    x: Float[Array, "B L D"], forward: Float[Array, "D K"], backward: Float[Array, "D K"] | None = None
) -> Float[Array, "B L D"]:
    """y_t = sum_l forward[l] x_{t-l} + sum_l backward[l] x_{t+l}, lag 0 in both: the reference, O(L^2) memory."""
    length, taps = x.shape[1], forward.shape[1]
    lag = np.arange(length)[:, None] - np.arange(length)[None, :]

    def toeplitz(kernel, lag):
        return jnp.where((lag >= 0) & (lag < taps), kernel[:, np.clip(lag, 0, taps - 1)], 0)

    matrix = toeplitz(forward, lag)
    if backward is not None:
        matrix += toeplitz(backward, -lag)
    return jnp.einsum("dts,bsd->btd", matrix, x)


def fft_convolve(
    x: Float[Array, "B L D"], forward: Float[Array, "D K"], backward: Float[Array, "D K"] | None = None
) -> Float[Array, "B L D"]:
    """`direct_convolve` by one circular convolution for both directions, in float32.

    The kernel of negative lags is written at the end of the circle, whose length is the next 2^a 3^b 5^c that is at
    least L + K - 1, so that nothing wraps around.
    """
    if not x.size:
        return x
    length, taps = x.shape[1], forward.shape[1]
    size = scipy.fft.next_fast_len(length + taps - 1, real=True)
    circle = jnp.pad(forward.astype(jnp.float32), ((0, 0), (0, size - taps)))
    if backward is not None:
        backward = backward.astype(jnp.float32)
        circle = circle.at[:, 0].add(backward[:, 0])
        if taps > 1:
            circle = circle.at[:, size - taps + 1 :].add(backward[:, :0:-1])
    spectrum = jnp.fft.rfft(circle, axis=1)
    # Channels first: the transform runs over contiguous memory.
    product = jnp.fft.rfft(swap(x.astype(jnp.float32)), n=size) * spectrum[None]
    return swap(jnp.fft.irfft(product, n=size)[..., :length]).astype(x.dtype)


@jax.custom_vjp
def swap(x: Float[Array, "B M N"]) -> Float[Array, "B N M"]:
    """The last two axes exchanged, in memory.

    On a CPU by a loop over pieces of M. XLA computes whatever x is made of inside a plain transpose, element by element
    across memory and once more for every use: half the time of a layer without attention (docs/performance.md). What
    a loop reads is there before.
    """
    return jax.lax.platform_dependent(x, cpu=_swap_by_pieces, default=lambda x: x.swapaxes(1, 2))


swap.defvjp(lambda x: (swap(x), None), lambda _, cotangent: (swap(cotangent),))


def _swap_by_pieces(x: Float[Array, "B M N"]) -> Float[Array, "B N M"]:
    batch, rows, columns = x.shape
    if not x.size:
        return x.reshape(batch, columns, rows)
    piece = min(PIECE, rows)

    def step(i, out):
        first = jnp.minimum(i * piece, rows - piece)  # the last piece may overlap the one before
        part = jax.lax.dynamic_slice_in_dim(x, first, piece, 1)
        return jax.lax.dynamic_update_slice_in_dim(out, part.swapaxes(1, 2), first, 2)

    return jax.lax.fori_loop(0, -(-rows // piece), step, jnp.zeros((batch, columns, rows), x.dtype))
