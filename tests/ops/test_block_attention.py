"""Attention in blocks of packed rows against `attend` over all rows, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, F32, assert_close, normal

from seqboat.ops.block_attention import attend_blocks
from seqboat.ops.blocks import Blocks
from seqboat.ops.packing import compress, extract, pack, row_info
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend

BATCH, LENGTH, KEY_SIZE, VALUE_SIZE, BLOCK = 2, 12, 4, 6, 4
ROWS = BATCH * LENGTH
TABLES = {"relative": 2 * 7 - 1, "slot": 6 * 5 - 1, "t5": 32}
# The gradient of the score of a sole key is 0.
FLOOR = 0.1


def activations() -> dict[str, np.ndarray]:
    some = np.random.default_rng(0).random((BATCH, LENGTH)) < 0.6
    one = np.zeros((BATCH, LENGTH), bool)
    one[1, 7] = True
    return {"none": np.zeros_like(some), "one": one, "some": some, "all": np.ones_like(some)}


def blocked(window, at_once, active, poison, table, q, k, v):
    """From rows to rows by way of packed ones, whose empty slots hold `poison`."""
    rows, (left, right) = row_info(active), window.halo(LENGTH)
    packing = pack(active, at_once * BLOCK, left=left, right=right)
    q, k = window.apply_rotary(q, rows), window.apply_rotary(k, rows)
    rows, *qkv = compress((rows, q, k, v), packing)
    q, k, v = (jnp.where((packing.source >= 0)[:, None], x, poison.astype(x.dtype)) for x in qkv)
    return extract(
        attend_blocks(window, table, q, k, v, rows, Blocks(packing.filled, BLOCK, left, right, at_once)), packing
    )


def dense(window, active, table, q, k, v):
    rows = row_info(active)
    o = attend(window, table, window.apply_rotary(q, rows), window.apply_rotary(k, rows), v, rows, rows)
    return jnp.where(rows.active[:, None], o, 0)


@pytest.mark.parametrize(
    ("window", "at_once", "dtype"),
    [
        (Window(3, True, "softmax", "relative"), 1, "float32"),
        (Window(5, False, "softmax", "slot"), 2, "float32"),
        (Window(None, False, "softmax", "rotary"), 1, "bfloat16"),
        (Window(5, False, "relu2", "slot"), 1, "float32"),
        (Window(None, True, "laplace", "t5"), 3, "float32"),
    ],
    ids=str,
)
def test_equals_attention_over_all_rows(window, at_once, dtype):
    @jax.jit
    def both(cotangent, active, poison, *args):
        got, transpose = jax.vjp(lambda *args: blocked(window, at_once, active, poison, *args), *args)
        expected, transposed = jax.vjp(lambda *args: dense(window, active, *args), *args)
        return (got, transpose(cotangent)), (expected, transposed(cotangent))

    size = TABLES.get(window.position)
    table = None if size is None else normal(4, size) / 2
    args = (normal(0, ROWS, KEY_SIZE), normal(1, ROWS, KEY_SIZE), normal(2, ROWS, VALUE_SIZE))
    cotangent, *args = (x.astype(dtype) for x in (normal(3, ROWS, VALUE_SIZE), *args))
    for active in activations().values():
        for poison in (0.0, 1e6):
            got, expected = both(cotangent, active, jnp.float32(poison), table, *args)
            assert got[0].dtype == dtype
            assert_close(got, expected, F32 if dtype == "float32" else BF16, FLOOR)


def test_the_gradient_computes_four_products_and_the_scores_again():
    """Forward q k and p v; backward q k, do v, p do, and ds k and ds q: p v is not recomputed."""
    window, active = Window(3, True, "softmax", "none"), jnp.asarray(activations()["all"])
    args = normal(0, ROWS, KEY_SIZE), normal(1, ROWS, KEY_SIZE), normal(2, ROWS, VALUE_SIZE)
    loss = lambda *args: blocked(window, 1, active, jnp.float32(0), None, *args).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*args)
    assert str(jaxpr).count("dot_general[") == 2 + 5
