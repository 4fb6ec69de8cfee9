"""What attention reads at single elements: its weights, and a vector's product with `gated` by source element.

<e, gated_t> is a sum over the elements that attention reads, exact with the attention's weights and its gate frozen
(`seqboat.interp.attribution.feature_by_source`).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.training.restore import Run
from experiments.training.step import apply
from seqboat.interp.attribution import feature_by_source
from seqboat.layers import taps
from seqboat.ops.packing import row_info
from seqboat.ops.window_attention import attend

CHUNK = 32  # elements at once, so that any number of them shares a program
SITES = ("q", "k", "v", "gate", "gated")


class Taken(NamedTuple):
    """One layer on n sequences of L elements, (n, L, ...), zero where attention is not `active`."""

    q: Any
    k: Any
    v: Any
    gate: Any
    gated: Any
    active: Any


class Terms(NamedTuple):
    """Of Q elements the attention `weights` and the `terms` of a product (Q, L), and the sum of these as the model has
    it, `whole` (Q,)."""

    weights: Any
    terms: Any
    whole: Any


def take(run: Run, layer: int, batches: Iterable[tuple[Any, int]]) -> Taken:
    """A layer, from 1, on batches, each with the number of its first sequences that count."""

    @jax.jit
    def look(variables: Any, batch: Any) -> Taken:
        _, found = apply(run.model, variables, batch, False, ("taps",))
        site = lambda name: taps.read(found["taps"], name)[layer - 1]
        values = {name: site(name).astype(jnp.float32) for name in SITES}
        return Taken(**values, active=site("active")[..., 0] > 0)

    parts = [jax.tree.map(lambda a, n=n: a[:n], jax.device_get(look(run.variables, batch))) for batch, n in batches]
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


class BySource:
    """`BySource(run, layer, taken)(e, numbers, positions)`: the terms of <e_i, gated> at elements i, each of a sequence
    of `taken` and a position in it where attention is active."""

    def __init__(self, run: Run, layer: int, taken: Taken):
        window = run.model.config.encoder.layer.make_window()
        table = run.variables["params"]["encoder"]["layers"]["gau"].get("position_bias")
        table = None if table is None else table[layer - 1]

        @jax.jit
        def terms(taken: Taken, vectors: Array, numbers: Array, positions: Array) -> Terms:
            def one(place: Any) -> Terms:
                vector, n, t = place
                rows = row_info(taken.active[n][None])
                q, k = window.apply_rotary(taken.q[n], rows), window.apply_rotary(taken.k[n], rows)
                query = jax.tree.map(lambda a: a[t][None], rows)
                read = lambda v: attend(window, table, q[t][None], k, v[:, None], query, rows)[0, 0]
                weights = jax.grad(read)(jnp.zeros(len(k)))  # as attention is linear in the values
                own = feature_by_source(vector, taken.gate[n, t], weights, taken.v[n])
                return Terms(weights, own, taken.gated[n, t] @ vector)

            return jax.lax.map(one, (vectors, numbers, positions))

        self._terms, self._taken = terms, taken

    def __call__(
        self, vectors: Float[np.ndarray, "Q E"], numbers: Int[np.ndarray, " Q"], positions: Int[np.ndarray, " Q"]
    ) -> Terms:
        count, length = len(numbers), self._taken.active.shape[1]
        found = [Terms(np.zeros((0, length)), np.zeros((0, length)), np.zeros(0))]
        for first in range(0, count, CHUNK):
            part = [each[first : first + CHUNK] for each in (vectors, numbers, positions)]
            fill = CHUNK - len(part[1])
            padded = (np.pad(each, [(0, fill)] + [(0, 0)] * (each.ndim - 1)) for each in part)
            own = self._terms(self._taken, *padded)
            found.append(jax.tree.map(lambda a, n=CHUNK - fill: np.asarray(a, np.float64)[:n], own))
        return jax.tree.map(lambda *a: np.concatenate(a), *found)
