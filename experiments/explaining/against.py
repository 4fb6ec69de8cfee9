"""The other seed: which units another run has in common with this one, and whether both route alike.

Per layer, the features of dictionaries where both runs have one, and the channels of m.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from experiments.common.config import differences
from experiments.common.errors import UserError, require
from experiments.evaluation import agreement
from experiments.evaluation.agreement import Matched, Seen
from experiments.explaining.contexts import marked, window
from experiments.explaining.dictionaries import Given, check_router, read
from experiments.reports import pictures
from experiments.reports.measure import Example, batches, sequences
from experiments.training.restore import Run, bound, load, seal

ELEMENTS = 65_536  # of the examples, at most, but at least one example
SHOWN = (0, 0.25, 0.5, 0.75)  # of all pairs, the best first: those whose text is shown


class Other(NamedTuple):
    """Another run of the same task, and dictionaries of some of its layers."""

    path: Path
    run: Run
    given: tuple[Given, ...]


def read_other(run: Run, path: Path | None, dictionaries: Sequence[Path], data_dir: str | None = None) -> Other | None:
    """The run at a path, None without one. Raises UserError for dictionaries without a run, for what is not a run, for
    this very run, for one of another task, data or number of layers, and for one without routers."""
    if path is None:
        require(not dictionaries, "--against_dictionaries are those of another run: --against=DIR is missing")
        return None
    where = f"--against={path}"
    other = bound(load(path, data_dir=data_dir))
    own, its = (seal(Path(each.origin), each.step) for each in (run, other))
    require(path.resolve() != Path(run.origin).resolve() and (own != its or not own), f"{where} is the run itself")
    task, others = ({**each.values["task"], "files": None} for each in (run, other))
    require(
        task["name"] == others["name"], f"{where} is of the task {others['name']}, and {run.origin} of {task['name']}"
    )
    if changed := differences(task, others, "config.task"):
        raise UserError(f"{where} is of another task than {run.origin}: {changed[0]}")
    if _data(run) != _data(other):
        raise UserError(f"{where} was trained on other data than {run.origin}")
    check_router(run)
    check_router(other)
    layers, its_layers = (each.model.config.encoder.layers for each in (run, other))
    require(layers == its_layers, f"{where} has {its_layers} layers, and {run.origin} has {layers}")
    flag = "--against_dictionaries"
    return Other(path, other, read(other, dictionaries, data_dir, flag) if dictionaries else ())


def _data(run: Run) -> Any:
    data = run.meta.get("data")
    return data.get("fingerprint") if isinstance(data, Mapping) else None


class Layer(NamedTuple):
    """One layer: `values` is what why.json has of it, `texts` those of SHOWN pairs, and pairs by the kind of unit."""

    values: dict[str, Any]
    texts: list[dict[str, Any]]
    matched: dict[str, Matched]


def compare(run: Run, given: Sequence[Given], other: Other, examples: Sequence[Example]) -> list[Layer]:
    """Every layer on the same examples, evenly spaced ones if they are more than ELEMENTS elements."""
    size = examples[0]["inputs"].shape[0] * examples[0]["lengths"].size
    chosen = list(examples[:: -(-len(examples) * size // ELEMENTS)])
    rows = [sequence for example in chosen for sequence in sequences(example)]
    valid = np.arange(len(rows[0][0]))[None] < np.array([length for _, length in rows])[:, None]
    first, second = (_see(each, chosen, len(rows)) for each in (run, other.run))
    of = lambda given, layer: next((each for each in given if each.layer == layer), None)
    return [
        _layer(run, number, pair, (of(given, number + 1), of(other.given, number + 1)), rows, valid)
        for number, pair in enumerate(zip(zip(*first, strict=True), zip(*second, strict=True), strict=True))
    ]


def _see(run: Run, examples: list[Example], count: int) -> Seen:
    """Without the rows that fill the last batch, which are its last ones."""
    found = agreement.see(run, (batch for batch, _ in batches(examples)))
    return Seen(found.m[:, :count], found.active[:, :count])


def _layer(
    run: Run,
    number: int,
    pair: Sequence[tuple[np.ndarray, np.ndarray]],
    dictionaries: tuple[Given | None, Given | None],
    rows: list[tuple[np.ndarray, int]],
    valid: Bool[np.ndarray, "n L"],
) -> Layer:
    (m, active), (other_m, other_active) = pair
    key = jax.random.key(number)
    found = {"channels": agreement.matched(m, other_m, valid, key, signed=False)}
    units = (m, other_m)
    if dictionaries[0] and dictionaries[1]:
        units = (_features(dictionaries[0], m), _features(dictionaries[1], other_m))
        found = {"features": agreement.matched(*units, valid, key, signed=True), **found}
    kind = next(iter(found))
    values = {
        "layer": number + 1,
        "kind": kind,
        **{name: each.values() for name, each in found.items()},
        "routing": agreement.routing(active, other_active, valid, key),
    }
    return Layer(values, list(_texts(run, found[kind], units, rows, valid)), found)


def _features(given: Given, m: Float[np.ndarray, "n L D"]) -> Float[np.ndarray, "n L F"]:
    return np.asarray(jax.jit(given.atoms.encode)(jnp.asarray(m)))


def _texts(
    run: Run,
    found: Matched,
    units: tuple[np.ndarray, np.ndarray],
    rows: list[tuple[np.ndarray, int]],
    valid: Bool[np.ndarray, "n L"],
) -> Iterator[dict[str, Any]]:
    """Of SHOWN pairs: the text around where this run's unit is farthest above its mean, with the marks of both."""
    order = np.argsort(-found.pairs.values, kind="stable")
    for place in dict.fromkeys(int(share * len(order)) for share in SHOWN):
        pair = (int(found.pairs.rows[order[place]]), int(found.pairs.columns[order[place]]))
        c = float(found.c[pair])
        above = [_above(values[..., unit], valid) for values, unit in zip(units, pair, strict=True)]
        if c < 0:
            above[1] = -above[1]
        number, position = np.unravel_index(above[0].argmax(), valid.shape)
        text, length = rows[number]
        around = window(run.task, int(position), length)
        yield {
            "units": pair,
            "rank": place + 1,
            "correlation": c,
            "runs": [marked(run.task, text, np.maximum(each[number], 0), around) for each in above],
        }


def _above(unit: Float[np.ndarray, "n L"], valid: Bool[np.ndarray, "n L"]) -> Float[np.ndarray, "n L"]:
    """How far a unit is above its mean, 0 in padding."""
    return np.where(valid, unit - unit[valid].mean(), 0)


def explain_other(
    run: Run, given: Sequence[Given], other: Other, examples: Sequence[Example]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What why.json has of the comparison, and what the page draws."""
    layers = compare(run, given, other, examples)
    step = other.run.step
    values = {"workdir": str(other.path), "step": step, "seal": seal(other.path, step)}
    return {**values, "layers": [layer.values for layer in layers]}, shown(layers, other)


def shown(layers: Sequence[Layer], other: Other) -> dict[str, Any]:
    """What the page draws: every layer with its texts and the picture of its pairs."""
    count = len(layers)
    return {
        "name": other.path.absolute().name,
        "step": other.run.step,
        "layers": [
            {**layer.values, "texts": layer.texts, "picture": _picture(layer, pictures.color(number, count))}
            for number, layer in enumerate(layers)
        ],
    }


def _picture(layer: Layer, shade: str) -> str:
    curves = []
    for name, found in layer.matched.items():
        curves += [(name, found.pairs.values, shade, "-" if name == layer.values["kind"] else ":")]
        curves += [(f"{name}, turned sequences", found.rolled, pictures.INK, "--" if len(curves) == 1 else ":")]
    return pictures.descending(curves, "correlation")
