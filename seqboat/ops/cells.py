"""Recurrent cells over sequences, in PyTorch's form: Elman, Jordan, LSTM and GRU.

A cell takes inputs that are already multiplied, z (B, L, G) = x W + b for all elements in one product, so that the scan
holds the product with the previous state alone. All have the signature

    cell(params, z, valid, state, reverse) -> (y (B, L, D) in the dtype of z, the state after the last valid element)

with `valid` (B, L): an element that is not valid leaves the state as it was, and y there is the y before it. `reverse`
runs from the last element to the first. States are float32 (B, D); products with them are in the dtype of z.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

State = tuple[Array, ...]  # h comes last
# (parameters beside the recurrent matrix, z_t (B, G), h_{t-1} U (B, G), previous state) -> state
Cell = Callable[[Array | None, Array, Array, State], State]


class JordanParams(NamedTuple):
    """`recurrent` U (D, D); `output` V (D, D); `output_bias` c (D,)."""

    recurrent: Array
    output: Array
    output_bias: Array


class LSTMParams(NamedTuple):
    """`recurrent` U (D, 4D); `peepholes` (3, D) of the input, forget and output gate, or None."""

    recurrent: Array
    peepholes: Array | None = None


class GRUParams(NamedTuple):
    """`recurrent` U (D, 3D); `recurrent_bias` (D,), the candidate's, inside its product with the reset gate."""

    recurrent: Array
    recurrent_bias: Array


def elman(
    recurrent: Float[Array, "D D"],
    z: Float[Array, "B L D"],
    valid: Bool[Array, "B L"],
    state: Float[Array, "B D"],
    reverse: bool = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D"]]:
    """h_t = tanh(z_t + h_{t-1} U), y = h (Elman 1990)."""

    def cell(_, z, product, state):
        return (jnp.tanh(z + product),)

    y, (state,) = _run(cell, recurrent, None, z, valid, (state,), reverse)
    return y, state


def jordan(
    params: JordanParams,
    z: Float[Array, "B L D"],
    valid: Bool[Array, "B L"],
    state: Float[Array, "B D"],
    reverse: bool = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D"]]:
    """y_t = tanh(z_t + y_{t-1} U) V + c: the output is fed back (Jordan 1986). The state is y."""

    def step(y, inputs):
        z, valid = inputs
        h = jnp.tanh(z.astype(jnp.float32) + _multiply(y, params.recurrent, z.dtype))
        after = _multiply(h, params.output, z.dtype) + params.output_bias[None]
        y = jnp.where(valid[:, None], after, y)
        return y, y.astype(z.dtype)

    state, y = jax.lax.scan(step, state, (z.swapaxes(0, 1), valid.T), reverse=reverse)
    return y.swapaxes(0, 1), state


def lstm(
    params: LSTMParams,
    z: Float[Array, "B L G"],
    valid: Bool[Array, "B L"],
    state: tuple[Float[Array, "B D"], Float[Array, "B D"]],
    reverse: bool = False,
) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B D"], Float[Array, "B D"]]]:
    """c_t = sig(f) c_{t-1} + sig(i) tanh(g), h_t = sig(o) tanh(c_t), y = h, where i, f, g, o = z_t + h_{t-1} U
    (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    With `peepholes` p, i and f also see p * c_{t-1}, and o sees p * c_t (Gers et al. 2002). The state is (c, h).
    """

    def cell(peepholes, z, product, state):
        i, f, g, o = jnp.split(z + product, 4, axis=-1)
        before = state[0]
        if peepholes is not None:
            i, f = i + peepholes[0][None] * before, f + peepholes[1][None] * before
        c = jax.nn.sigmoid(f) * before + jax.nn.sigmoid(i) * jnp.tanh(g)
        if peepholes is not None:
            o = o + peepholes[2][None] * c
        return c, jax.nn.sigmoid(o) * jnp.tanh(c)

    y, (c, h) = _run(cell, params.recurrent, params.peepholes, z, valid, state, reverse)
    return y, (c, h)


def gru(
    params: GRUParams,
    z: Float[Array, "B L G"],
    valid: Bool[Array, "B L"],
    state: Float[Array, "B D"],
    reverse: bool = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D"]]:
    """h_t = (1 - u) n + u h_{t-1}, y = h, where r, u = sig(z_t + h_{t-1} U), n = tanh(z_n + r * (h_{t-1} U_n + b_n))
    (Cho et al. 2014; they have r inside the product, (r * h_{t-1}) U_n)."""

    def cell(bias, z, product, state):
        z_r, z_u, z_n = jnp.split(z, 3, axis=-1)
        product_r, product_u, product_n = jnp.split(product, 3, axis=-1)
        r, u = jax.nn.sigmoid(z_r + product_r), jax.nn.sigmoid(z_u + product_u)
        n = jnp.tanh(z_n + r * (product_n + bias[None]))
        return ((1 - u) * n + u * state[0],)

    y, (state,) = _run(cell, params.recurrent, params.recurrent_bias, z, valid, (state,), reverse)
    return y, state


def _run(
    cell: Cell, recurrent: Array, rest: Array | None, z: Array, valid: Array, state: State, reverse: bool
) -> tuple[Array, State]:
    h, state = _scan(cell, reverse, (recurrent, rest), z.swapaxes(0, 1), valid.T, state)
    return h.swapaxes(0, 1), state


def _multiply(h: Array, matrix: Array, dtype: jnp.dtype) -> Array:
    return jnp.matmul(h.astype(dtype), matrix.astype(dtype), preferred_element_type=jnp.float32)


def _advance(cell: Cell, rest: Array | None, z: Array, product: Array, valid: Array, before: State) -> State:
    """The state after one element of every stream."""
    after = cell(rest, z.astype(jnp.float32), product, before)
    return tuple(jnp.where(valid[:, None], new, old) for new, old in zip(after, before, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    cell: Cell, reverse: bool, weights: tuple[Array, Array | None], z: Array, valid: Array, state: State
) -> tuple[Array, State]:
    """h after every element, (L, B, D), and the last state. z (L, B, G), `valid` (L, B).

    Its own gradient, because that of a scan adds to the gradient of U in every step. Here a step finds the gradient of
    the products h_{t-1} U; that of U is one product of all h_{t-1} with them, after the scan.
    """
    recurrent, rest = weights

    def step(before, inputs):
        z, valid = inputs
        after = _advance(cell, rest, z, _multiply(before[-1], recurrent, z.dtype), valid, before)
        return after, after[-1].astype(z.dtype)

    last, h = jax.lax.scan(step, state, (z, valid), reverse=reverse)
    return h, last


def _forward(cell, reverse, weights, z, valid, state):
    """`_scan`, and for its gradient h before every element and the transpose of every step."""
    recurrent, rest = weights

    def step(before, inputs):
        z, valid = inputs
        advance = lambda rest, z, product, before: _advance(cell, rest, z, product, valid, before)
        product = _multiply(before[-1], recurrent, z.dtype)
        after, transpose = jax.vjp(advance, rest, z, product, before)
        return after, (after[-1].astype(z.dtype), before[-1].astype(z.dtype), transpose)

    last, (h, before, transposes) = jax.lax.scan(step, state, (z, valid), reverse=reverse)
    return (h, last), (recurrent, before, transposes)


def _backward(cell, reverse, kept, cotangents):
    recurrent, before, transposes = kept
    dh, d_state = cotangents
    transposed, dtype = recurrent.T, before.dtype

    def step(d_state, inputs):
        transpose, dh = inputs
        d_rest, dz, d_product, d_before = transpose((*d_state[:-1], d_state[-1] + dh))
        through = _multiply(d_product, transposed, dtype)
        # Where a cell only adds z and the product, their gradients are one array, which is stored once.
        own = None if d_product is dz else d_product
        return (*d_before[:-1], d_before[-1] + through), (d_rest, dz, own)

    d_state, (d_rest, dz, d_products) = jax.lax.scan(step, d_state, (transposes, dh), reverse=not reverse)
    d_products = dz if d_products is None else d_products
    d_recurrent = jnp.einsum("lbd,lbg->dg", before, d_products.astype(dtype), preferred_element_type=jnp.float32)
    d_rest = jax.tree.map(lambda leaf: leaf.sum(0), d_rest)
    return (d_recurrent.astype(recurrent.dtype), d_rest), dz, None, d_state


_scan.defvjp(_forward, _backward)
