"""The multi-dimensional damped exponential moving average (Ma et al. 2022, MEGA, arXiv 2209.10655, eq. 5-6).

Every channel has N real states:  h_t = q h_{t-1} + p beta x_t,   y_t = <gamma, h_t> / sqrt(N) + omega x_t,   with
p = sigmoid(delta) and q = 1 - p sigmoid(alpha) in (0, 1).  Unrolled, y is a convolution of x with the kernel
kappa[l] = sum_n gamma_n / sqrt(N) p_n beta_n q_n^l.  A bidirectional average adds a second kernel over the elements
after t; both include lag 0.

Names follow the published code, not the paper: `delta` is the paper's alpha (weight), `alpha` its delta (damping).
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqboat.ops.convolution import direct_convolve, fft_convolve, swap

Method = Literal["auto", "fft", "chunked", "reference"]

CHUNK = 64
# On a CPU the FFT is faster up to this length, chunks beyond it; truncated kernels always need the FFT.
LONGEST_FFT = 4096
# On an accelerator chunks use the matrix units: some 400 FLOP and 10 bytes per element, whereas the FFT moves 60 bytes.
# Derived from these numbers, not measured.
ACCELERATOR_CHUNK = 128


class EMAParams(NamedTuple):
    """`delta`, `alpha`, `beta`, `gamma` (D or 2D, N): D rows for the past, then D for the future. `omega` (D,)."""

    delta: Array
    alpha: Array
    beta: Array
    gamma: Array
    omega: Array

    @property
    def bidirectional(self) -> bool:
        return self.delta.shape[0] != self.omega.shape[0]

    def direction(self, ahead: bool) -> "EMAParams":
        """The parameters of one direction."""
        width = self.omega.shape[0]
        rows = slice(width, 2 * width) if ahead else slice(0, width)
        return EMAParams(self.delta[rows], self.alpha[rows], self.beta[rows], self.gamma[rows], self.omega)

    @property
    def directions(self) -> list[tuple[bool, "EMAParams"]]:
        """For every direction, whether it looks ahead, and its parameters."""
        return [(ahead, self.direction(ahead)) for ahead in (False, True)[: 1 + self.bidirectional]]


class Coefficients(NamedTuple):
    """Coefficients of the recurrence, each (D, N), float32: log q, input weight p beta, output weight gamma /
    sqrt(N)."""

    log_decay: Array
    input: Array
    output: Array

    def decay(self, steps: np.ndarray) -> Array:
        """q^steps: (D, N, len(steps)), for integers steps >= 0."""
        return jnp.exp(self.log_decay[..., None] * jnp.asarray(steps, jnp.float32)[None, None])


def coefficients(params: EMAParams) -> Coefficients:
    delta, alpha, beta, gamma = (a.astype(jnp.float32) for a in params[:4])
    p = jax.nn.sigmoid(delta)
    return Coefficients(jnp.log1p(-p * jax.nn.sigmoid(alpha)), p * beta, gamma / gamma.shape[-1] ** 0.5)


def naive_kernel(params: EMAParams, length: int) -> Float[Array, "S K"]:
    """kappa[0..length-1] by its definition: S N K exponentials."""
    c = coefficients(params)
    return jnp.einsum("sn,snk->sk", c.output * c.input, c.decay(np.arange(length)))


def kernel(params: EMAParams, length: int) -> Float[Array, "S K"]:
    """kappa[0..length-1] with q^(aC+b) = q^(aC) q^b: one batched product and S N (K/C + C) exponentials."""
    c = coefficients(params)
    return _sum_of_decays(c, (c.output * c.input)[:, None], length)[:, 0]


def _sum_of_decays(c: Coefficients, weights: Float[Array, "S R N"], length: int) -> Float[Array, "S R K"]:
    """sum_n weights_n q_n^l for l = 0..length-1 and R rows of weights, with at most S R N K/C intermediate numbers."""
    inner, outer = _parts(length)
    coarse = weights[..., None] * c.decay(inner * np.arange(outer))[:, None]
    product = jnp.einsum("srna,snb->srab", coarse, c.decay(np.arange(inner)))
    return product.reshape(*weights.shape[:2], outer * inner)[..., :length]


def _parts(length: int) -> tuple[int, int]:
    """C ~ sqrt(length), and the number of chunks."""
    inner = 1 << max(0, (length - 1).bit_length() // 2)
    return inner, -(-length // inner)


def convolve(
    params: EMAParams,
    x: Float[Array, "B L D"],
    valid: Bool[Array, "B L"] | None = None,
    *,
    truncation: int | None = None,
    method: Method = "auto",
) -> Float[Array, "B L D"]:
    """The average of every element's past (and future, where the parameters are bidirectional), plus omega x.

    Elements that are not `valid` enter the average as zeros but keep their own direct term omega x.

    `truncation` cuts the kernel to that many lags, as the published recipes do; None keeps the full kernel, and the
    result then equals the recurrence of `recurrent_step` exactly. Computed in float32, returned in x's dtype. Without
    elements it is empty.
    """
    if not x.size:
        return x
    length = x.shape[1]
    signal = _signal(x, valid)
    taps = length if truncation is None else min(truncation, length)
    method = choose(method, length, truncation)
    if method == "chunked":
        if taps < length:
            raise ValueError(f"a kernel truncated to {taps} lags has no chunked form: use method='fft'")
        y = _chunked(params, signal, _chunk())[0]
    else:
        y = _by_kernels(params, signal, taps, method)
    return (y + _direct(params, x)).astype(x.dtype)


def convolve_piece(
    params: EMAParams, x: Float[Array, "B L D"], valid: Bool[Array, "B L"] | None = None, method: Method = "auto"
) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B D N"], ...]]:
    """An untruncated `convolve` of a piece of longer sequences from zero states, in float32, and the outgoing states.

    One state per direction: sum_t q^(L-1-t) p beta x_t after the last element or, looking ahead, sum_t q^t p beta x_t
    before the first. `continuation` gives the contribution of incoming states:

        y, leaving = convolve_piece(params, x, valid)
        y += continuation(params, entering, x.shape[1])
    """
    signal, length = _signal(x, valid), x.shape[1]
    if not x.size:
        return signal, tuple(jnp.zeros((len(x), *own.delta.shape), jnp.float32) for _, own in params.directions)
    method = choose(method, length, None)
    if method == "chunked":
        y, leaving = _chunked(params, signal, _chunk())
    else:
        y = _by_kernels(params, signal, length, method)
        leaving = [_leaving(own, signal, ahead) for ahead, own in params.directions]
    return y + _direct(params, x), tuple(state.swapaxes(0, 1) for state in leaving)


def continuation(
    params: EMAParams, entering: tuple[Float[Array, "B D N"], ...], length: int
) -> Float[Array, "B {length} D"]:
    """y_t = sum_n gamma_n / sqrt(N) q_n^(t+1) h_n: the contribution of incoming states, one per direction, to a piece.

    Looking ahead, the state enters after the last element, and the power of q is length - t. Float32; at most B D N L/C
    intermediate numbers.
    """
    batch, width, _ = entering[0].shape
    if not (batch and length):
        return jnp.zeros((batch, length, width), jnp.float32)
    y = jnp.zeros((width, batch, length), jnp.float32)
    for (ahead, own), state in zip(params.directions, entering, strict=True):
        c = coefficients(own)
        added = _sum_of_decays(c, (c.output * jnp.exp(c.log_decay))[:, None] * state.swapaxes(0, 1), length)
        y += added[..., ::-1] if ahead else added
    return swap(y.reshape(1, width, -1)).reshape(batch, length, width)


def _by_kernels(params: EMAParams, x: Float[Array, "B L D"], taps: int, method: Method) -> Float[Array, "B L D"]:
    apply, kernel_of = (direct_convolve, naive_kernel) if method == "reference" else (fft_convolve, kernel)
    return apply(x, *(kernel_of(own, taps) for _, own in params.directions))


def _leaving(params: EMAParams, x: Float[Array, "B L D"], ahead: bool) -> Float[Array, "D B N"]:
    """The outgoing state of a piece, from zero, in one direction: first of every chunk of C elements, then combined.

    Memory is that of the chunks' states: B D N L/C numbers.
    """
    inner, outer = _parts(x.shape[1])
    fine, coarse, padding = np.arange(inner), inner * np.arange(outer), (0, inner * outer - x.shape[1])
    if not ahead:  # distances count from the end, so padding comes before the first element
        fine, coarse, padding = fine[::-1], coarse[::-1], padding[::-1]
    c = coefficients(params)
    rows = jnp.pad(swap(x), ((0, 0), (0, 0), padding))
    parts = jnp.einsum("bdac,dnc->dban", rows.reshape(*rows.shape[:2], outer, inner), c.decay(fine))
    return jnp.einsum("dban,dna->dbn", parts, c.input[..., None] * c.decay(coarse))


def _signal(x: Float[Array, "B L D"], valid: Bool[Array, "B L"] | None) -> Float[Array, "B L D"]:
    """The averaged values: float32, zero where an element is not valid."""
    x = x.astype(jnp.float32)
    return x if valid is None else jnp.where(valid[..., None], x, 0)


def choose(method: Method, length: int, truncation: int | None) -> Method:
    """Resolves "auto" for this backend and sequence length; returns other methods unchanged."""
    if method != "auto":
        return method
    if truncation is not None and truncation < length:
        return "fft"
    return "fft" if jax.default_backend() == "cpu" and length <= LONGEST_FFT else "chunked"


def _chunk() -> int:
    return CHUNK if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK


def _direct(params: EMAParams, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return (params.omega.astype(jnp.float32)[None] * rows).reshape(x.shape)


def recurrent_step(
    params: EMAParams, state: Float[Array, "B D N"], x: Float[Array, "B D"]
) -> tuple[Float[Array, "B D N"], Float[Array, "B D"]]:
    """One step of a causal average:  h <- q h + p beta x,   y = <gamma, h> / sqrt(N) + omega x.

    Exactly what an untruncated `convolve` computes at this position, for any number of steps before it.
    """
    c = coefficients(params)
    state = jnp.exp(c.log_decay)[None] * state + c.input[None] * x.astype(jnp.float32)[..., None]
    y = jnp.einsum("bdn,dn->bd", state, c.output) + _direct(params, x)
    return state, y.astype(x.dtype)


def stream(
    params: EMAParams,
    state: Float[Array, "B D N"],
    x: Float[Array, "B L D"],
    lengths: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B D N"], Float[Array, "B L D"]]:
    """`recurrent_step` over pieces of any length: the state after each piece's last valid element, and its outputs.

    `lengths` are the true lengths of the pieces, 0..L; outputs beyond them are meaningless.
    """
    if params.bidirectional:
        raise ValueError("a bidirectional average looks ahead and cannot be streamed")
    batch, length, _ = x.shape
    if not x.size:
        return state, x
    lengths = jnp.full(batch, length) if lengths is None else lengths
    valid = jnp.arange(length)[None] < lengths[:, None]
    if length == 1:
        after, y = recurrent_step(params, state, x[:, 0])
        return jnp.where(valid[..., None], after, state), y[:, None]
    y, _ = convolve_piece(params, x, valid)
    y += continuation(params, (state,), length)
    # Every piece is shifted to the end of the array, so that the outgoing state is that after its last valid element.
    source = jnp.arange(length)[None] + lengths[:, None] - length
    moved = jnp.take_along_axis(_signal(x, valid), jnp.maximum(source, 0)[..., None], axis=1)
    leaving = _leaving(params, jnp.where(source[..., None] >= 0, moved, 0), False).swapaxes(0, 1)
    decay = jnp.exp(lengths.astype(jnp.float32)[:, None, None] * coefficients(params).log_decay[None])
    return decay * state + leaving, y.astype(x.dtype)


def _chunked(
    params: EMAParams, x: Float[Array, "B L D"], chunk: int
) -> tuple[Float[Array, "B L D"], list[Float[Array, "D B N"]]]:
    """The average without omega x, and the outgoing state in each direction, from zero states.

    One product with the Toeplitz matrix of a chunk, with N extra columns per direction for the chunk's contribution to
    the state; one scan over the M chunks; one product for the contributions of incoming states.
    """
    batch, length, width = x.shape
    count = -(-length // chunk)
    # (D, B, L): all rows' channels first.
    rows = jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0))).reshape(1, -1, width)
    blocks = swap(rows).reshape(width, batch, count, chunk)
    forms = [_chunk_form(own, chunk, ahead) for ahead, own in params.directions]
    columns = jnp.concatenate([sum(f.within for f in forms), *(f.into_state for f in forms)], -1)
    product = jnp.einsum("dbmj,djk->dbmk", blocks, columns)
    y, *added = jnp.split(product, np.cumsum([chunk] + [params.gamma.shape[1]] * len(forms))[:-1], -1)
    entering, leaving = [], []
    rest = length % chunk
    for form, own in zip(forms, added, strict=True):
        step = functools.partial(_carry, jnp.exp(chunk * form.log_decay)[:, None])
        nothing = jnp.zeros_like(own[:, :, 0])
        last, before = jax.lax.scan(step, nothing, jnp.moveaxis(own, 2, 0), reverse=form.ahead)
        if rest and not form.ahead:  # the last chunk was padded: take the state after its last valid element
            last = jnp.exp(rest * form.log_decay)[:, None] * before[-1]
            last += _leaving(params.direction(False), x[:, length - rest :], False)
        entering.append(jnp.moveaxis(before, 0, 2))
        leaving.append(last)
    y += jnp.einsum(
        "dbmn,dni->dbmi", jnp.concatenate(entering, -1), jnp.concatenate([f.out_of_state for f in forms], 1)
    )
    y = swap(y.reshape(1, width, -1)).reshape(batch, -1, width)[:, :length]
    return y, leaving


def _carry(decay: Array, state: Array, added: Array) -> tuple[Array, Array]:
    """The state after a chunk, and the state before it."""
    return decay * state + added, state


class _ChunkForm(NamedTuple):
    """One direction within a chunk: source to target (D, C, C), source to state (D, C, N), state to target (D, N,
    C)."""

    ahead: bool
    log_decay: Array
    within: Array
    into_state: Array
    out_of_state: Array


def _chunk_form(params: EMAParams, chunk: int, ahead: bool) -> _ChunkForm:
    c = coefficients(params)
    lag = np.arange(chunk)[None, :] - np.arange(chunk)[:, None]
    within = jnp.where(lag >= 0, kernel(params, chunk)[:, np.maximum(lag, 0)], 0)
    into = (c.input[..., None] * c.decay(np.arange(chunk)[::-1])).swapaxes(1, 2)
    out = c.output[..., None] * c.decay(np.arange(1, chunk + 1))
    if ahead:  # the same chunk read from its end
        within, into, out = within[:, ::-1, ::-1], into[:, ::-1], out[:, :, ::-1]
    return _ChunkForm(ahead, c.log_decay, within, into, out)
