"""Look-ups in tables."""

import jax.numpy as jnp
from jaxtyping import Array, Inexact


def look_up(table: Inexact[Array, "V ..."], index: Array) -> Inexact[Array, "..."]:
    """table[index], and NaN where an index is not one of 0..V-1.

    Plain indexing would clip, and count negative indices from the end: plausible numbers of another symbol. A compiled
    program cannot raise, so NaN makes the error visible. A product with zero does not remove NaN: callers that index by
    padding must mask it by `jnp.where`. Raises ValueError for indices that are not integers.
    """
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"a table of {table.shape[0]} rows is indexed by integers, not by {index.dtype}")
    return table.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
