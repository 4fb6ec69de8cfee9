"""Tables that data index: what is not there is NaN, and what is there is as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import grid, normal

from seqboat.ops.tables import look_up


@pytest.mark.parametrize("kind", grid(("int32", "uint8", "int8"), "uint8"))
def test_rows_and_gradients_of_a_table_are_those_of_indexing_bit_for_bit(kind):
    table, index, cotangent = normal(0, 5, 3), jnp.array([[0, 4, 4], [2, 0, 1]], kind), normal(1, 2, 3, 3)
    run = lambda read: jax.jit(jax.value_and_grad(lambda table: jnp.vdot(read(table), cotangent)))(table)
    for got, expected in zip(run(lambda t: look_up(t, index)), run(lambda t: t[index]), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", grid(("float32", "bfloat16", "complex64"), "float32"))
def test_what_is_not_in_the_table_is_nan_and_pays_nothing(kind):
    table, index = normal(0, 5, 3).astype(kind), jnp.array([-1, 5, 2, -6, 2**31 - 1])

    @jax.jit
    def run(table):
        value = lambda table: jnp.abs(look_up(table, index)[2]).astype(jnp.float32).sum()
        return look_up(table, index), jax.grad(value)(table)

    got, gradient = run(table)
    np.testing.assert_array_equal(got[2], table[2])
    assert got.dtype == table.dtype
    assert np.isnan(np.asarray(got[np.array([0, 1, 3, 4])], np.complex64)).all()
    assert np.isfinite(np.asarray(gradient, np.complex64)).all()


@pytest.mark.parametrize("index", [jnp.ones(2), jnp.ones(5, bool)])
def test_an_index_is_a_whole_number(index):
    with pytest.raises(ValueError, match="a table of 5 rows is indexed by integers, not by"):
        look_up(normal(0, 5, 3), index)
