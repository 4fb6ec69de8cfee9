"""What attention reads: the features of `gated` by the distance and the symbol of the tokens that they come from.

A feature's <e_i, gated_t> is a sum over the tokens that attention reads, exact with the attention's weights and its
gate frozen (`seqboat.interp.attribution.feature_by_source`).
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.explaining.contexts import contexts
from experiments.explaining.dictionaries import READ, Given
from experiments.explaining.words import Words
from experiments.reports.measure import batches, sequences
from experiments.training.restore import Run
from experiments.training.step import apply
from seqboat.interp import scorers
from seqboat.interp.attribution import feature_by_source
from seqboat.layers import taps
from seqboat.ops.packing import row_info
from seqboat.ops.window_attention import attend

ELEMENTS = 2**15  # whose queries, keys, values and gates are held, at most, but of two examples
SHOWN = 4  # features
QUERIES = 32  # tokens of a feature, and of attention as a whole
LARGEST = 3  # distances, and symbols, that are shown
SITES = ("q", "k", "v", "gate", READ)


class Taken(NamedTuple):
    """One layer on n sequences of L elements, (n, L, ...), zero where attention is not `active`."""

    q: Any
    k: Any
    v: Any
    gate: Any
    gated: Any
    active: Any


class Terms(NamedTuple):
    """Of Q tokens the attention `weights` and a feature's `terms` (Q, L), and the sum of these as the model has it,
    `whole` (Q,)."""

    weights: Any
    terms: Any
    whole: Any


def by_source(run: Run, given: Given, words: Words) -> dict[str, Any]:
    """What why.json has of a dictionary of `gated`: features with the largest mean at active elements."""
    size = words.examples[0]["inputs"].shape[0] * words.examples[0]["lengths"].size
    least = max(ELEMENTS // size, 2)
    words = words.every(-(-len(words.examples) // least))
    rows = [sequence for example in words.examples for sequence in sequences(example)]
    taken, terms = _take(run, given, words)
    active = np.asarray(taken.active)
    f = np.where(active[..., None], np.asarray(jax.jit(type(given.atoms).encode)(given.atoms, taken.gated)), 0)
    alive, total = f.max((0, 1)) > 0, f.sum((0, 1), np.float64)
    shown = [number for number in np.argsort(-total, kind="stable")[:SHOWN].tolist() if alive[number]]
    nearest = scorers.nearest(np.asarray(given.atoms.decoder), alive) if alive.sum() > 1 else None
    of = lambda numbers: np.moveaxis(f[..., numbers], -1, 0)
    said = words.of(
        READ, given.layer, given.atoms, shown, of(shown), None if nearest is None else of(nearest[shown].tolist())
    )
    tokens = None if words.parts is None else np.stack([values for values, _ in rows])
    elements = max(int(active.sum()), 1)
    found, difference, scale = [], 0.0, 0.0
    for number, own in zip(shown, said, strict=True):
        places = _spread(f[..., number] > 0)
        each = terms(given.atoms.encoder[:, number], *places)
        difference = max(difference, float(np.abs(each.terms.sum(1) - each.whole).max()))
        scale = max(scale, float(np.abs(each.whole).max()))
        found.append(
            {
                "feature": number,
                "fires": float((f[..., number] > 0).sum() / elements),
                "mean": float(total[number] / elements),
                "tokens": len(places[0]),
                **own,
                **_shares(each.terms, places, tokens),
                "contexts": contexts(run.task, rows, f[..., number]),
            }
        )
    places = _spread(active)
    whole = terms(given.atoms.encoder[:, 0], *places).weights if active.any() else np.zeros((0, active.shape[1]))
    return {
        "layer": given.layer,
        "dictionary": {"workdir": str(given.path), "step": given.step, "rows": given.config.rows},
        "examples": len(words.examples),
        "active": int(active.sum()),
        "size": f.shape[-1],
        "alive": int(alive.sum()),
        "largest_difference": difference,
        "scale": scale,
        "attention": {"tokens": len(places[0]), **_shares(whole, places, tokens)},
        "shown": found,
    }


def _take(run: Run, given: Given, words: Words) -> tuple[Taken, Any]:
    """The layer on the examples, and a function of an encoder's row and of tokens, sequences (Q,) and positions (Q,):
    their `Terms`."""

    @jax.jit
    def look(variables: Any, batch: Any, layer: Array) -> Taken:
        _, found = apply(run.model, variables, batch, False, ("taps",))
        site = lambda name: taps.read(found["taps"], name)[layer]
        values = {name: site(name).astype(jnp.float32) for name in SITES}
        return Taken(**values, active=site("active")[..., 0] > 0)

    parts = []
    for batch, count in batches(list(words.examples)):
        rows = count * batch["lengths"][0].size
        part = jax.device_get(look(run.variables, batch, given.layer - 1))
        parts.append(jax.tree.map(lambda a, rows=rows: a[:rows], part))
    taken = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    window = run.model.config.encoder.layer.make_window()
    table = run.variables["params"]["encoder"]["layers"]["gau"].get("position_bias")
    table = None if table is None else table[given.layer - 1]

    @jax.jit
    def terms(taken: Taken, encoder: Array, numbers: Array, positions: Array) -> Terms:
        def one(place: Any) -> Terms:
            n, t = place
            rows = row_info(taken.active[n][None])
            q, k = window.apply_rotary(taken.q[n], rows), window.apply_rotary(taken.k[n], rows)
            query = jax.tree.map(lambda a: a[t][None], rows)
            read = lambda v: attend(window, table, q[t][None], k, v[:, None], query, rows)[0, 0]
            weights = jax.grad(read)(jnp.zeros(len(k)))  # as attention is linear in the values
            own = feature_by_source(encoder, taken.gate[n, t], weights, taken.v[n])
            return Terms(weights, own, taken.gated[n, t] @ encoder)

        return jax.lax.map(one, (numbers, positions))

    def padded(encoder: Array, numbers: np.ndarray, positions: np.ndarray) -> Terms:
        fill = [(0, QUERIES - len(numbers))]  # so that all features share a program
        found = terms(taken, encoder, np.pad(numbers, fill), np.pad(positions, fill))
        return jax.tree.map(lambda a: np.asarray(a, np.float64)[: len(numbers)], found)

    return taken, padded


def _spread(where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Up to QUERIES elements where (n, L) holds, evenly spaced."""
    numbers, positions = np.nonzero(where)
    chosen = np.linspace(0, len(numbers) - 1, min(QUERIES, len(numbers))).round().astype(int)
    return numbers[chosen], positions[chosen]


def _shares(
    terms: Float[np.ndarray, "Q L"], places: Sequence[np.ndarray], tokens: np.ndarray | None
) -> dict[str, list[dict[str, Any]]]:
    """The largest parts of the terms by `distances`, negative before the token, and by `symbols`, none if inputs are
    numbers: signed sums over that of all sizes."""
    whole = max(float(np.abs(terms).sum()), float(np.finfo(np.float64).tiny))
    numbers, positions = places
    distances: dict[int, float] = collections.defaultdict(float)
    symbols: dict[int, float] = collections.defaultdict(float)
    for row, source in np.argwhere(terms != 0).tolist():
        distances[source - int(positions[row])] += terms[row, source] / whole
        if tokens is not None:
            symbols[int(tokens[numbers[row], source])] += terms[row, source] / whole
    best = lambda found: sorted(found.items(), key=lambda pair: (-abs(pair[1]), abs(pair[0])))[:LARGEST]
    return {
        "distances": [{"distance": distance, "share": float(share)} for distance, share in best(distances)],
        "symbols": [{"symbol": symbol, "share": float(share)} for symbol, share in best(symbols)],
    }
