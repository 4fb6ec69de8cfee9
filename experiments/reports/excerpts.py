"""A few examples with their active tokens marked: text, pixels, or a waveform."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reports import pictures
from experiments.reports.measure import Measured, sequences
from experiments.tasks.features import PixelConfig

EXAMPLES = 4
SERIES = 4  # of an example
SYMBOLS = 600
SHORT = 200  # symbols of an example beside others
CONTEXT = 12  # symbols on each side of one
SHADES = 4  # of confidence in text


def excerpts(task: Any, measured: Measured) -> dict[str, Any]:
    """EXAMPLES evenly spaced examples. `kind` is how they are drawn, with `shown` of the `of` series."""
    series = evenly(list(enumerate(measured.names)))
    kind = _kind(task)
    return {
        "kind": kind,
        "shown": len(series),
        "of": len(measured.names),
        "empty_symbol": kind == "text" and any((example["inputs"] == 0).any() for example in measured.examples),
        "examples": [
            _example(task, kind, measured, number, series) for number in evenly(range(len(measured.examples)), EXAMPLES)
        ],
    }


def plain(task: Any, example: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The input of an example without marks: `text`, or a `picture`; the other is empty."""
    values = example["inputs"][: int(example["lengths"])]
    if _kind(task) == "text":
        return {"text": "".join(map(task.symbol, values[:SHORT].tolist())), "picture": ""}
    return {"text": "", "picture": pictures.plain(values, _kind(task) == "pixels")}


def _kind(task: Any) -> str:
    if task.config.vocabulary_size is not None:
        return "text"
    return "pixels" if isinstance(task.config, PixelConfig) else "waveform"


def _example(task: Any, kind: str, measured: Measured, number: int, series: list[tuple[int, str]]) -> dict[str, Any]:
    """One example: its number in the split, its answer if it has a single target, and its passages or pictures."""
    example = measured.examples[number]
    one_target = not example["targets"].ndim
    found: dict[str, Any] = {
        "number": measured.numbers[number] + 1,
        "target": task.class_name(int(example["targets"])) if one_target else None,
        "answer": task.class_name(int(measured.answers[number])) if one_target else None,
        "passages": [],
        "pictures": [],
    }
    each = len(measured.valid) // len(measured.examples)  # two documents of a pair
    for row, (values, length) in enumerate(sequences(example), start=each * number):
        values = values[:length]
        active, confidence = measured.active[:, row, :length], measured.confidence[:, row, :length]
        if kind == "text":
            symbols = [task.symbol(symbol) for symbol in values[:SYMBOLS].tolist()]
            found["passages"] += _passages(symbols, active, confidence, series)
        elif kind == "pixels":
            found["pictures"].append(pictures.picture(values[:, 0], active, confidence, series, len(measured.names)))
        else:
            found["pictures"].append(pictures.waveform(values[:, 0], active, series, len(measured.names)))
    return found


def _passages(
    symbols: list[str], active: np.ndarray, confidence: np.ndarray, series: list[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """The first symbols of a sequence, marked for each series; once without marks if there are no series.

    `runs` are (class of the mark, text), the class "" where the series is inactive.
    """
    if not series:
        yield {"name": "", "runs": [("", "".join(symbols))]}
    for number, name in series:
        shade = np.clip((confidence[number] - 0.5) * 2 * SHADES, 0, SHADES - 1).astype(int)
        marks = [f"s{number} a{shade[i]}" if active[number][i] else "" for i in range(len(symbols))]
        groups = itertools.groupby(zip(marks, symbols, strict=True), key=lambda pair: pair[0])
        yield {
            "name": name,
            "rate": active[number].mean(),
            "shown": len(symbols),
            "length": active.shape[1],
            "runs": [(mark, "".join(symbol for _, symbol in group)) for mark, group in groups],
        }


def around(task: Any, values: np.ndarray, position: int) -> tuple[str, str, str]:
    """The symbols before a position, at it and after it, on one line; empty if the inputs are not symbols."""
    if task.config.vocabulary_size is None:
        return "", "", ""
    text = lambda part: "".join(map(task.symbol, part.tolist()))
    here = text(values[position : position + 1])
    found = (
        text(values[max(position - CONTEXT, 0) : position]),
        here.strip() or here,
        text(values[position + 1 : position + 1 + CONTEXT]),
    )
    before, here, after = (part.replace("\n", "") for part in found)
    return before, here, after


def evenly(items: Sequence[Any], count: int = SERIES) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[place] for place in sorted({round(place) for place in np.linspace(0, len(items) - 1, count)})]
