"""The page `why.html`. All of its HTML and prose is in `why.html.j2`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.evaluation.explanations import COLUMNS, WIDTH
from experiments.explaining.contexts import marked, window
from experiments.explaining.measure import CERTAIN, Explained
from experiments.reports import pictures
from experiments.reports.excerpts import CONTEXT
from experiments.reports.page import shades, template
from experiments.training.restore import Run
from seqboat.interp.predicates import plain_symbol

TEMPLATE = "why.html.j2"
LARGEST = 3  # features of the sentence on a layer


def page(
    why: Mapping[str, Any],
    explained: Sequence[Explained],
    run: Run,
    rows: list[tuple[np.ndarray, int]],
    other: Mapping[str, Any] | None = None,
) -> str:
    """The whole file, from what why.json holds and what only pictures show; `other` is what `against.shown`
    draws of another run."""
    layers = why["model_layers"]
    missing = sorted(set(range(1, layers + 1)) - {layer.given.layer for layer in explained})
    task = run.values["task"]
    return template(TEMPLATE, __package__).render(
        run=Path(why["run"]["workdir"]).absolute().name,
        why=why,
        kind=re.sub("(?<=[a-z])(?=[A-Z])", " ", why["model"]["name"]).lower(),
        task=str(task.get("dataset") or {"corpus": "this text"}.get(task["name"], task["name"])).replace("_", " "),
        shades=shades(layers),
        layers=[_layer(layer, run, rows, layers) for layer in explained],
        reading=[_reading(layer, run.task) for layer in why["reading"]],
        columns=COLUMNS,
        width=WIDTH,
        missing=missing,
        other=other,
        certain=CERTAIN,
        modules=len(run.model.config.encoder.layer.make_modules()),
        facts=[("command", why["command"]), ("hardware", why["hardware"]), *why["versions"].items()],
    )


def _layer(layer: Explained, run: Run, rows: list[tuple[np.ndarray, int]], layers: int) -> dict[str, Any]:
    """One layer's values, with its colour and its pictures; `decided`: whether anything is decided in it."""
    shade, decision = pictures.color(layer.given.layer - 1, layers), layer.decision
    values, length = rows[0]
    around = window(run.task, decision.position, length, before=3 * CONTEXT)
    text: list[Any] = []
    if not decision.missing:
        text = marked(run.task, values, np.maximum(decision.sources, 0), around)
    by = lambda name, sign: sorted(layer.values["shown"], key=lambda feature: sign * feature[name])
    return {
        **layer.values,
        "decided": 0 < layer.values["rate"] < 1,
        "most_for": [feature for feature in by("contribution", -1) if feature["contribution"] > 0][:LARGEST],
        "most_against": [feature for feature in by("against", 1) if feature["against"] < 0][:LARGEST],
        "by_feature": _by_feature(layer, shade),
        "by_source": None if decision.missing else _by_source(layer, shade),
        "text": text,
        "norms": pictures.pairs(layer.pairs, ("norm of m - centre", "norm of the features"), shade),
    }


def _reading(layer: Mapping[str, Any], task: Any) -> dict[str, Any]:
    """A layer of why.json's `reading`, with distances and symbols as text."""

    def named(found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **found,
            "distances": [{**each, "place": _place(each["distance"])} for each in found["distances"]],
            "symbols": [{**each, "text": plain_symbol(task.symbol, each["symbol"])} for each in found["symbols"]],
        }

    return {**layer, "attention": named(layer["attention"]), "shown": [named(each) for each in layer["shown"]]}


def _by_feature(layer: Explained, shade: str) -> str:
    found = layer.decision
    fires = np.flatnonzero(found.features).tolist()
    parts = [(f"feature {number}", float(found.features[number])) for number in fires]
    return pictures.terms(parts, [("constant", found.constant), ("residual", found.error)], "features", shade)


def _by_source(layer: Explained, shade: str) -> str:
    found = layer.decision
    parts = [(_place(s - found.position), float(term)) for s, term in enumerate(found.sources)]
    return pictures.terms(parts, [("constant", found.source_constant)], "tokens", shade)


def _place(offset: int) -> str:
    return "the token itself" if offset == 0 else f"{abs(offset)} {'before' if offset < 0 else 'after'}"
