"""Tables that data index."""

import jax.numpy as jnp
from jaxtyping import Array, Inexact


def look_up(table: Inexact[Array, "V ..."], index: Array) -> Inexact[Array, "..."]:
    """table[index], and NaN where an index is not one of 0..V-1.

    Indexing alone would give the nearest row, and for negative numbers count from the end: plausible numbers of another
    symbol. A compiled program cannot raise, so the mistake is made visible. NaN is not zeroed by a product: whoever
    indexes by padding takes it out by `jnp.where`, after or before. Raises ValueError for an index that is not a whole
    number.
    """
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"a table of {table.shape[0]} rows is indexed by whole numbers, not by {index.dtype}")
    return table.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
