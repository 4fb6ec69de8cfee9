"""Terms of the loss that modules state themselves: `model.apply(variables, ..., mutable=["terms"])` returns them.

The training step adds, for every name, coefficient * mean to the mean loss. In `Encoder`'s scan every layer states its
own; the mean of a name is over all of them. A module that a router activates cannot state terms: it holds only
parameters.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array


class Term(NamedTuple):
    """`scaled` is coefficient * total; the mean is total / weight. Scalars, or one for every layer."""

    scaled: Array
    total: Array
    weight: Array


def term(module: nn.Module, name: str, coefficient: float, total: Array, weight: Array) -> None:
    """State a term: a sum `total` () over elements of the total weight `weight` ()."""
    if not module.is_initializing():
        module.sow("terms", name, Term(coefficient * total, total, weight))


def collect(terms: Any) -> dict[str, Term]:
    """The collection "terms" by name: sums over all modules, layers and calls."""
    found: dict[str, Term] = {}
    for name, value in terms.items():
        inner = collect(value) if isinstance(value, Mapping) else {name: jax.tree.map(lambda *a: sum(a), *value)}
        for key, one in inner.items():
            one = jax.tree.map(lambda leaf: leaf.sum(), one)
            found[key] = jax.tree.map(lambda a, b: a + b, found[key], one) if key in found else one
    return found
