"""What attention reads: the features of `gated` by the distance and the symbol of the tokens that they come from
(`experiments.evaluation.attention`)."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from experiments.evaluation import attention
from experiments.explaining.contexts import contexts
from experiments.explaining.dictionaries import READ, Given
from experiments.explaining.words import Words
from experiments.reports.measure import batches, sequences
from experiments.training.restore import Run
from seqboat.interp import scorers

ELEMENTS = 2**15  # whose queries, keys, values and gates are held, at most, but of two examples
SHOWN = 4  # features
QUERIES = 32  # tokens of a feature, and of attention as a whole
LARGEST = 3  # distances, and symbols, that are shown


def by_source(run: Run, given: Given, words: Words) -> dict[str, Any]:
    """What why.json has of a dictionary of `gated`: features with the largest mean at active elements."""
    size = words.examples[0]["inputs"].shape[0] * words.examples[0]["lengths"].size
    least = max(ELEMENTS // size, 2)
    words = words.every(-(-len(words.examples) // least))
    rows = [sequence for example in words.examples for sequence in sequences(example)]
    pieces = ((batch, count * batch["lengths"][0].size) for batch, count in batches(list(words.examples)))
    taken = attention.take(run, given.layer, pieces)
    terms = attention.BySource(run, given.layer, taken)
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
        vector = np.asarray(given.atoms.encoder[:, number])
        each = terms(np.broadcast_to(vector, (len(places[0]), len(vector))), *places)
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
    whole = terms(np.zeros((len(places[0]), len(given.atoms.encoder)), np.float32), *places).weights
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
