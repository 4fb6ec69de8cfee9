"""Matrices in fewer bits for inference: int8 or bfloat16 kernels, multiplied as such.

    variables = quantize(variables, "int8")
    with quantized_products():                  when the program is traced
        output = model.apply(variables, tokens, lengths)

Converting a kernel to float32 where it is used would write and read a copy of it in every step. Instead its input is
converted: to bfloat16, or to two rows of int8, so that int8 loses digits of the kernel only.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from seqboat.layers.gau import Columns
from seqboat.layers.streaming import MAX_IN_PLACE_LENGTH

Tree = Any
ParameterDtype = Literal["float32", "bfloat16", "int8"]

# The largest int8, of either sign.
LARGEST = 127
# The second int8 of a number counts in 254ths of the first: rounding leaves at most half a unit.
UNITS = 2 * LARGEST
# Sums of as many products of two int8 fit in 32 bits.
MOST_ROWS = 2**31 // LARGEST**2 - 1
# A CPU's product of fewer rows in bfloat16 converts the kernel element by element.
LEAST_ROWS = 8


def quantize(variables: Mapping[str, Tree], dtype: str) -> dict[str, Tree]:
    """The variables with the kernels of dense layers in `dtype`; "float32" changes nothing.

    "int8" replaces a kernel W (..., K, M) by round(W / s) and adds `kernel_scale` s (..., M) = max_k |W_km| / 127, one
    per output column, so no element moves by more than s / 2. Everything else stays as it is: embeddings, norms,
    biases, state space models, and the router, whose decisions are discontinuous. Raises ValueError for another dtype.
    """
    if dtype not in get_args(ParameterDtype):
        raise ValueError(f"parameter_dtype={dtype!r}: must be one of {', '.join(get_args(ParameterDtype))}")
    return {name: _quantize(tree, dtype) if name == "params" else tree for name, tree in variables.items()}


def _quantize(tree: Tree, dtype: str) -> Tree:
    if dtype == "float32" or not isinstance(tree, Mapping):
        return tree
    changed = {name: leaf if name == "configurator" else _quantize(leaf, dtype) for name, leaf in tree.items()}
    kernel = changed.get("kernel")
    if kernel is None or kernel.ndim < 2 or kernel.shape[-2] > MOST_ROWS:
        return changed
    if dtype == "bfloat16":
        return {**changed, "kernel": kernel.astype(jnp.bfloat16)}
    rounded, scale = _round(kernel, axis=-2)
    return {**changed, "kernel": rounded.astype(jnp.int8), "kernel_scale": scale.squeeze(-2)}


def quantized_products() -> contextlib.AbstractContextManager:
    """Within it, modules traced or called multiply by quantized kernels; others are unaffected."""
    return nn.intercept_methods(_intercept)


def _intercept(call: Any, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    if not isinstance(module, nn.Dense | Columns) or context.method_name != "__call__":
        return call(*arguments, **options)
    kernel: Array | None = module.get_variable("params", "kernel")
    if kernel is None or kernel.dtype not in (jnp.int8, jnp.bfloat16):
        return call(*arguments, **options)
    x, first, last = (*arguments, None, None)[:3]  # a dense layer computes all columns
    columns = slice(first, last)
    scale, bias = (module.get_variable("params", name) for name in ("kernel_scale", "bias"))
    # As in `Columns`: for few rows, slicing the kernel costs more than computing all columns.
    few = x.ndim == 2 and x.shape[0] <= MAX_IN_PLACE_LENGTH
    take = lambda leaf: leaf if few or leaf is None else leaf[..., columns]
    y = _product(x.reshape(-1, x.shape[-1]), take(kernel), take(scale))
    y = y if bias is None else y + take(bias)[None]
    y = y[:, columns] if few else y
    return y.reshape(*x.shape[:-1], -1).astype(module.dtype or x.dtype)


@jax.custom_batching.custom_vmap
def _product(x: Float[Array, "T K"], kernel: Array, scale: Float[Array, "M"] | None) -> Float[Array, "T M"]:
    """x W in float32; the rows of several streams are multiplied together."""
    return _int8_product(x, kernel, scale) if scale is not None else _bfloat16_product(x, kernel)


@_product.def_vmap
def _product_of_streams(streams: int, batched: Any, x: Array, kernel: Array, scale: Array | None) -> tuple[Array, bool]:
    if not batched[0] or any(jax.tree.leaves(batched[1:])):
        raise NotImplementedError("quantized kernels are shared by all streams")
    return _product(x.reshape(-1, x.shape[-1]), kernel, scale).reshape(streams, x.shape[1], -1), True


def _int8_product(x: Float[Array, "T K"], kernel: Int8[Array, "K M"], scale: Float[Array, "M"]) -> Float[Array, "T M"]:
    """x ~ a (h + l / 254), h and l int8, a per row: within a / 508, or 2^-16 of the row's largest element."""
    x = x.astype(jnp.float32)
    high, a = _round(x, axis=-1)
    low = jnp.round((x / a - high) * UNITS)
    both = jnp.concatenate([high, low]).astype(jnp.int8)
    sums = jnp.matmul(both, kernel, preferred_element_type=jnp.int32).astype(jnp.float32)
    high_sum, low_sum = jnp.split(sums, 2)
    return (high_sum + low_sum / UNITS) * a * scale[None]


def _bfloat16_product(x: Float[Array, "T K"], kernel: Array) -> Float[Array, "T M"]:
    count = len(x)
    padded = jnp.pad(x.astype(jnp.bfloat16), ((0, max(LEAST_ROWS - count, 0)), (0, 0)))
    return jnp.matmul(padded, kernel, preferred_element_type=jnp.float32)[:count]


def _round(x: Array, axis: int) -> tuple[Array, Array]:
    """x / s rounded to -127..127, and s = max |x| / 127 along the axis, 1 where all are zero."""
    largest = jnp.abs(x).max(axis, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / LARGEST)
    return jnp.round(x / scale), scale
