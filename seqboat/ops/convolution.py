"""Long convolutions of a sequence with one kernel a channel, in one direction or both."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
    length, taps = x.shape[1], forward.shape[1]
    size = fast_fft_length(length + taps - 1)
    circle = jnp.pad(forward.astype(jnp.float32), ((0, 0), (0, size - taps)))
    if backward is not None:
        backward = backward.astype(jnp.float32)
        circle = circle.at[:, 0].add(backward[:, 0])
        if taps > 1:
            circle = circle.at[:, size - taps + 1 :].add(backward[:, :0:-1])
    spectrum = jnp.fft.rfft(circle, axis=1)
    # Channels first: the transform runs over contiguous memory. Padded before and cut after the transposes, which XLA
    # would otherwise fuse with whatever x and the cotangent are made of: 1.5 to 1.8 times the time on a CPU.
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, size - length), (0, 0)))
    product = jnp.fft.rfft(padded.swapaxes(1, 2)) * spectrum[None]
    return jnp.fft.irfft(product, n=size).swapaxes(1, 2)[:, :length].astype(x.dtype)


def fast_fft_length(minimum: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least `minimum`."""
    best = 1 << (minimum - 1).bit_length()
    power5 = 1
    while power5 < best:
        power15 = power5
        while power15 < best:
            power2 = 1 << max(0, (-(-minimum // power15) - 1).bit_length())
            best = min(best, power15 * power2)
            power15 *= 3
        power5 *= 5
    return best
