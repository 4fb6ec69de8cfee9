"""Where a feature is strongest: a few sequences around its largest activations, marked."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.reports.excerpts import CONTEXT, SHADES

CONTEXTS = 3

Run = tuple[int | None, str]


def contexts(
    task: Any, sequences: list[tuple[np.ndarray, int]], active: Float[np.ndarray, "n L"]
) -> list[dict[str, Any]]:
    """The CONTEXTS sequences with the largest activations of a feature, each around its largest: the number of the
    `sequence`, the `position`, `activation` and `symbol`, and `runs` of text (`marked`), none if inputs are numbers."""
    peaks, largest = active.argmax(1), active.max(1)
    found = []
    for number in np.argsort(-largest, kind="stable")[:CONTEXTS].tolist():
        if largest[number] == 0:
            break
        (values, length), peak = sequences[number], int(peaks[number])
        around = window(task, peak, length)
        found.append(
            {
                "sequence": number,
                "position": peak,
                "activation": float(largest[number]),
                "symbol": task.symbol(int(values[peak])).strip() if around.stop else "",
                "runs": marked(task, values, active[number], around),
            }
        )
    return found


def marked(task: Any, values: np.ndarray, strength: Float[np.ndarray, "L"], around: slice) -> list[Run]:
    """The symbols of a part of a sequence as runs of (shade, text): more strength is a higher shade, and none, None."""
    there, most = strength[around], max(strength.max(), np.finfo(np.float32).tiny)
    shades = np.clip(there / most * SHADES, 0, SHADES - 1).astype(int)
    marks = [shade if f > 0 else None for shade, f in zip(shades.tolist(), there, strict=True)]
    symbols = [task.symbol(symbol) for symbol in values[around].tolist()]
    groups = itertools.groupby(zip(marks, symbols, strict=True), key=lambda pair: pair[0])
    return [(mark, "".join(symbol for _, symbol in group)) for mark, group in groups]


def window(task: Any, position: int, length: int, before: int = CONTEXT) -> slice:
    """The elements around a position, of which there are symbols to show; none of numbers."""
    if task.config.vocabulary_size is None:
        return slice(0)
    return slice(max(position - before, 0), min(position + 1 + CONTEXT, length))
