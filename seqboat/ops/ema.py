"""The multi-dimensional damped exponential moving average (Ma et al. 2022, MEGA, arXiv 2209.10655, eq. 5-6).

Every channel has N real states:  h_t = q h_{t-1} + p beta x_t,   y_t = <gamma, h_t> / sqrt(N) + omega x_t,   with
p = sigmoid(delta) and q = 1 - p sigmoid(alpha) in (0, 1).  Unrolled, y is a convolution of x with the kernel
kappa[l] = sum_n gamma_n / sqrt(N) p_n beta_n q_n^l.  A bidirectional average adds a second kernel over the elements
after t; both include lag 0.

A kernel truncated to K lags has a recurrence too: what entered K elements ago leaves the state,

    h_t = q h_{t-1} + p beta (x_t - q^K x_{t-K}),

so that every form of the full kernel computes a truncated one, by a second pass over x delayed by K.

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
# On a CPU the FFT is faster up to this length, chunks beyond it. With a truncated kernel chunks take 1.7 to 1.9 times
# as long as the FFT at 4,096 and 16,000 elements.
LONGEST_FFT = 4096
# On an accelerator chunks use the matrix units: some 400 FLOP and 14 bytes per element, about twice that if the kernel
# is truncated, whereas the FFT moves 60 bytes. Derived from these numbers, not measured.
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

    def tail(self, lags: int) -> "EMAParams":
        """The parameters of one direction whose kernel is kappa[lags], kappa[lags + 1], ...; without a direct term."""
        c = coefficients(self)
        return self._replace(beta=jnp.exp(lags * c.log_decay) * self.beta, omega=jnp.zeros_like(self.omega))

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

    def decay(self, lags: np.ndarray) -> Array:
        """q^lags: (D, N, len(lags)), for integers lags >= 0."""
        return jnp.exp(self.log_decay[..., None] * jnp.asarray(lags, jnp.float32)[None, None])


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

    `truncation` cuts the kernel to that many lags, as the published recipes do; None keeps the full kernel. The result
    equals that of `stream` exactly. Computed in float32, returned in x's dtype; on an accelerator, chunks of a bfloat16
    x are multiplied by kernels rounded to bfloat16. Without elements it is empty.
    """
    if not x.size:
        return x
    length = x.shape[1]
    signal = _signal(x, valid)
    taps = length if truncation is None else min(truncation, length)
    method = choose(method, length, truncation)
    if method == "chunked":
        y = _chunked(params, signal, _chunk(), taps)[0]
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
        return signal.astype(jnp.float32), tuple(
            jnp.zeros((len(x), *own.delta.shape), jnp.float32) for _, own in params.directions
        )
    method = choose(method, length, None)
    if method == "chunked":
        y, leaving = _chunked(params, signal, _chunk(), length)
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
    return apply(x.astype(jnp.float32), *(kernel_of(own, taps) for _, own in params.directions))


def _leaving(params: EMAParams, x: Float[Array, "B L D"], ahead: bool) -> Float[Array, "D B N"]:
    """The outgoing state of a piece, from zero, in one direction: first of every chunk of C elements, then combined.

    Memory is that of the chunks' states: B D N L/C numbers.
    """
    inner, outer = _parts(x.shape[1])
    fine, coarse, padding = np.arange(inner), inner * np.arange(outer), (0, inner * outer - x.shape[1])
    if not ahead:  # distances count from the end, so padding comes before the first element
        fine, coarse, padding = fine[::-1], coarse[::-1], padding[::-1]
    c = coefficients(params)
    rows = jnp.pad(swap(x.astype(jnp.float32)), ((0, 0), (0, 0), padding))
    parts = jnp.einsum("bdac,dnc->dban", rows.reshape(*rows.shape[:2], outer, inner), c.decay(fine))
    return jnp.einsum("dban,dna->dbn", parts, c.input[..., None] * c.decay(coarse))


def _signal(x: Float[Array, "B L D"], valid: Bool[Array, "B L"] | None) -> Float[Array, "B L D"]:
    """The averaged values: zero where an element is not valid."""
    return x if valid is None else jnp.where(valid[..., None], x, 0)


def choose(method: Method, length: int, truncation: int | None) -> Method:
    """Resolves "auto" for this backend and sequence length; returns other methods unchanged."""
    if method != "auto":
        return method
    truncated = truncation is not None and truncation < length
    return "fft" if _on_cpu() and (truncated or length <= LONGEST_FFT) else "chunked"


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _chunk() -> int:
    return CHUNK if _on_cpu() else ACCELERATOR_CHUNK


def _direct(params: EMAParams, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return (params.omega.astype(jnp.float32)[None] * rows).reshape(x.shape)


def recurrent_step(
    params: EMAParams, state: Float[Array, "B D N"], x: Float[Array, "B D"]
) -> tuple[Float[Array, "B D N"], Float[Array, "B D"]]:
    """One step of a causal average:  h <- q h + p beta x,   y = <gamma, h> / sqrt(N) + omega x.

    Exactly what an untruncated `convolve` computes at this position, for any number of elements before it.
    """
    c = coefficients(params)
    # q h = h + (q - 1) h: rounding a q near 1 would change q^K by K roundings, all of one sign.
    state = state + jnp.expm1(c.log_decay)[None] * state + c.input[None] * x.astype(jnp.float32)[..., None]
    y = jnp.einsum("bdn,dn->bd", state, c.output) + _direct(params, x)
    return state, y.astype(x.dtype)


class WindowState(NamedTuple):
    """The state of B streams of an average truncated to K lags, zeros at the start.

    `average` (B, D, N) is h, which holds the last K elements; `recent` (B, K + 1, D) has these elements and one more,
    in a ring where `next` (B,) is the slot of the next one. There is no much smaller state: a kernel of K arbitrary
    lags responds to each of the last K - 1 elements on its own.
    """

    average: Array
    recent: Array
    next: Array


State = Array | WindowState


def initial_state(batch: int, width: int, size: int, truncation: int | None, dtype: jnp.dtype) -> State:
    """The state of B streams at their start: (B, D, N) in float32, for a truncated kernel with its last elements in
    `dtype`, that of x."""
    average = jnp.zeros((batch, width, size), jnp.float32)
    if truncation is None:
        return average
    return WindowState(average, jnp.zeros((batch, truncation + 1, width), dtype), jnp.zeros(batch, jnp.int32))


def stream(
    params: EMAParams, state: State, x: Float[Array, "B L D"], lengths: Int[Array, "B"] | None = None
) -> tuple[State, Float[Array, "B L D"]]:
    """The average of a piece of B streams from the `state` before it: the state after each piece's last valid element,
    and the outputs. The kernel is truncated if the state is a `WindowState`.

    `lengths` are the true lengths of the pieces, 0..L; outputs beyond them are meaningless. In pieces of any lengths,
    the outputs are those of `convolve` for the whole streams.
    """
    if params.bidirectional:
        raise ValueError("a bidirectional average looks ahead and cannot be streamed")
    if not x.size:
        return state, x
    lengths = jnp.full(len(x), x.shape[1]) if lengths is None else lengths
    if not isinstance(state, WindowState):
        state, y = _stream(params, state, x, lengths)
        return state, y.astype(x.dtype)
    left, recent = _exchange(state, x, lengths)
    average, y = _stream(params, state.average, x, lengths)
    slots = recent.shape[1]
    less, tail = _stream(params.tail(slots - 1), jnp.zeros_like(average), left, lengths)
    return WindowState(average - less, recent, (state.next + lengths) % slots), (y - tail).astype(x.dtype)


def _exchange(
    state: WindowState, x: Float[Array, "B L D"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B L D"], Float[Array, "B slots D"]]:
    """The elements that leave the window as those of x enter, K elements before each, and the ring after it."""
    slots, (batch, length, _) = state.recent.shape[1], x.shape
    stream, number = np.arange(batch)[:, None], np.arange(length)[None]
    slot = (state.next[:, None] + number) % slots
    read = lambda ring: ring.at[stream, (slot + 1) % slots].get(mode="promise_in_bounds")
    kept = (number < lengths[:, None]) & (number >= lengths[:, None] - slots)
    recent = state.recent.at[stream, jnp.where(kept, slot, slots)].set(x.astype(state.recent.dtype), mode="drop")
    if length == 1:  # what is read is still there: a ring that is read after it was written is updated in place
        return read(recent), recent
    left = read(state.recent)
    if length >= slots:  # the others entered in this piece
        left = jnp.concatenate([left[:, : slots - 1], x[:, : 1 - slots].astype(left.dtype)], axis=1)
    return left, recent


def _stream(
    params: EMAParams, state: Float[Array, "B D N"], x: Float[Array, "B L D"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B D N"], Float[Array, "B L D"]]:
    """`stream` with the whole kernel, y in float32."""
    length = x.shape[1]
    valid = jnp.arange(length)[None] < lengths[:, None]
    if length == 1:
        after, y = recurrent_step(params, state, x[:, 0].astype(jnp.float32))
        return jnp.where(valid[..., None], after, state), y[:, None]
    y, _ = convolve_piece(params, x, valid)
    y += continuation(params, (state,), length)
    # Every piece is shifted to the end of the array, so that the outgoing state is that after its last valid element.
    source = jnp.arange(length)[None] + lengths[:, None] - length
    moved = jnp.take_along_axis(_signal(x, valid), jnp.maximum(source, 0)[..., None], axis=1)
    leaving = _leaving(params, jnp.where(source[..., None] >= 0, moved, 0), False).swapaxes(0, 1)
    decay = jnp.exp(lengths.astype(jnp.float32)[:, None, None] * coefficients(params).log_decay[None])
    return decay * state + leaving, y


def _chunked(
    params: EMAParams, x: Float[Array, "B L D"], chunk: int, taps: int
) -> tuple[Float[Array, "B L D"], list[Float[Array, "D B N"]]]:
    """The average without omega x, in float32; for taps = L also the outgoing state of each direction from zero states.

    One product with the Toeplitz matrix of a chunk and one for its contribution to the state; one scan over the M
    chunks; one product for the contributions of incoming states. For a truncated kernel, the same products of x delayed
    by `taps` with the kernel's tail are subtracted, before the scan where they concern states.
    """
    batch, length, width = x.shape
    count = -(-length // chunk)
    x = x.astype(jnp.float32) if _on_cpu() else x
    # (D, B, L): all rows' channels first.
    rows = swap(jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0))).reshape(1, -1, width))
    rows = rows.reshape(width, batch, count * chunk)
    in_chunks = lambda rows: rows.reshape(width, batch, count, chunk)
    forms = [_chunk_form(own, chunk, ahead) for ahead, own in params.directions]
    within = functools.reduce(jnp.add, [form.within for form in forms])
    y, added = _products(in_chunks(rows), within, [form.into_state for form in forms])
    for i, (ahead, own) in enumerate(params.directions if taps < length else []):
        tail = _chunk_form(own.tail(taps), chunk, ahead)
        less, (left,) = _products(in_chunks(_delay(rows, taps, ahead)), tail.within, [tail.into_state])
        y -= less
        added[i] -= left
    entering = [_entering(form, own) for form, own in zip(forms, added, strict=True)]
    y += jnp.einsum(
        "dbmn,dni->dbmi", jnp.concatenate(entering, -1), jnp.concatenate([form.out_of_state for form in forms], 1)
    )
    y = swap(y.reshape(1, width, -1)).reshape(batch, -1, width)[:, :length]
    last, pieces = x[:, (count - 1) * chunk :], zip(forms, params.directions, entering, added, strict=True)
    return y, [_after_chunks(form, own, last, *states) for form, (_, own), *states in pieces]


def _delay(x: Array, lag: int, ahead: bool) -> Array:
    """x shifted by `lag` elements along axis 2, later or, if `ahead`, earlier; zeros enter."""
    shift = (-lag, lag, 0) if ahead else (lag, -lag, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [shift if axis == 2 else (0, 0, 0) for axis in range(x.ndim)])


def _products(
    blocks: Float[Array, "D B M C"], within: Float[Array, "D C C"], into_states: list[Float[Array, "D C N"]]
) -> tuple[Float[Array, "D B M C"], list[Float[Array, "D B M N"]]]:
    """What the elements of a chunk give to each other, and what they add to the state in each direction."""
    if _on_cpu():  # one product of all columns is faster
        product = jnp.einsum("dbmj,djk->dbmk", blocks, jnp.concatenate([within, *into_states], -1))
        y, *added = jnp.split(product, np.cumsum([a.shape[-1] for a in (within, *into_states)])[:-1], -1)
        return y, added
    # A truncated kernel subtracts from a state what was added to it before: both must be the same to the last bits, so
    # these few products take no shortcut in precision.
    precise = functools.partial(jnp.einsum, "dbmj,djn->dbmn", precision=jax.lax.Precision.HIGHEST)
    return _toeplitz_product(blocks, within), [precise(blocks.astype(jnp.float32), into) for into in into_states]


@jax.custom_vjp
def _toeplitz_product(blocks: Float[Array, "D B M J"], matrix: Float[Array, "D J K"]) -> Float[Array, "D B M K"]:
    """blocks times matrix, both in the blocks' dtype, summed in float32; so are the gradients.

    Rounding the cotangent loses nothing: that of an average returned in this dtype has no more digits.
    """
    return _sum_products("dbmj,djk->dbmk", blocks, matrix.astype(blocks.dtype))


def _toeplitz_gradients(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    blocks, matrix = saved
    cotangent = cotangent.astype(blocks.dtype)
    d_blocks = _sum_products("dbmk,djk->dbmj", cotangent, matrix.astype(blocks.dtype))
    return d_blocks.astype(blocks.dtype), _sum_products("dbmj,dbmk->djk", blocks, cotangent)


_sum_products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_toeplitz_product.defvjp(
    lambda blocks, matrix: (_toeplitz_product(blocks, matrix), (blocks, matrix)), _toeplitz_gradients
)


def _entering(form: "_ChunkForm", added: Float[Array, "D B M N"]) -> Float[Array, "D B M N"]:
    """The state that enters each chunk, from zero:  h_{m+1} = q^C h_m + added_m  or, looking ahead, from the last chunk
    to the first. One chunk after the other on a CPU; in log M parallel steps elsewhere."""
    chunk = form.within.shape[1]
    decay = jnp.exp(chunk * form.log_decay)
    if _on_cpu():
        step = functools.partial(_carry, decay[:, None])
        _, before = jax.lax.scan(step, jnp.zeros_like(added[:, :, 0]), jnp.moveaxis(added, 2, 0), reverse=form.ahead)
        return jnp.moveaxis(before, 0, 2)
    width, _, count, size = added.shape
    decay = jnp.broadcast_to(decay[:, None, None], (width, 1, count, size))
    _, after = jax.lax.associative_scan(_join, (decay, added), reverse=form.ahead, axis=2)
    return _delay(after, 1, form.ahead)


def _carry(decay: Array, state: Array, added: Array) -> tuple[Array, Array]:
    """The state after a chunk, and the state before it."""
    return decay * state + added, state


def _join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """h -> a h + b, then h -> c h + d."""
    (a, b), (c, d) = first, second
    return a * c, c * b + d


def _after_chunks(
    form: "_ChunkForm", params: EMAParams, x: Float[Array, "B R D"], entering: Array, added: Array
) -> Float[Array, "D B N"]:
    """The state that leaves the last chunk, which holds `x` before its padding, or the first one if looking ahead."""
    if form.ahead:
        return jnp.exp(form.within.shape[1] * form.log_decay)[:, None] * entering[:, :, 0] + added[:, :, 0]
    return jnp.exp(x.shape[1] * form.log_decay)[:, None] * entering[:, :, -1] + _leaving(params, x, False)


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
    within = _toeplitz(kernel(params, chunk))
    into = (c.input[..., None] * c.decay(np.arange(chunk)[::-1])).swapaxes(1, 2)
    out = c.output[..., None] * c.decay(np.arange(1, chunk + 1))
    if ahead:  # the same chunk read from its end
        within, into, out = within[:, ::-1, ::-1], into[:, ::-1], out[:, :, ::-1]
    return _ChunkForm(ahead, c.log_decay, within, into, out)


def _toeplitz(kernel: Float[Array, "D C"]) -> Float[Array, "D C C"]:
    """[d, j, k] = kernel[d, k - j], 0 where k < j, by shapes alone: rows of kernel and C zeros, read as rows shorter by
    one. The gradient is a sum of rows; that of an index is a scatter of C^2 numbers by atomics on a GPU."""
    width, chunk = kernel.shape
    rows = jnp.broadcast_to(jnp.pad(kernel, ((0, 0), (0, chunk)))[:, None], (width, chunk, 2 * chunk))
    return rows.reshape(width, -1)[:, :-chunk].reshape(width, chunk, -1)[..., :chunk]
