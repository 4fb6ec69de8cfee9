"""Interpreters on functions whose insides are known (`seqboat.interp.functions`; FIND, Schwettmann et al. 2023).

    python -m experiments.study --study=functions --check

Numeric functions of all families, clean and corrupted in an interval, by four ways to probe them; functions of
sequences, and units with noise, two predicates, or a corrupted class of contexts, by a search of all candidates. Every
interpreter asks at most `BUDGET` inputs. A row is the mean over the functions of one kind and seed.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.studies.protocol import Bar, judge, ranged
from seqboat.interp.functions import interpreters, numeric, symbols
from seqboat.interp.functions.protocol import Function, Interpreter, examine

FOLDER = "insight"
# The bars, in the worst seed: shares of corrupted numeric functions whose NMSE is below 0.1.
LEAST_OUTSIDE = 0.85  # random probing, outside of the corruption
MOST_INSIDE = 0.3  # the same inside
OVER_RANDOM = 0.3  # adaptive over random probing, inside

BUDGET, COUNT, NOISE = 40, 24, 0.05
FIELDS = ("overall", "outside", "inside", "template")
FAMILIES = tuple(numeric.FAMILIES)
# Functions by kind, from a seed and the number of the function.
KINDS: dict[str, Callable[[int, int], Function]] = {
    "numeric, clean": lambda seed, i: numeric.draw(seed, FAMILIES[i % len(FAMILIES)], NOISE),
    "numeric, corrupted": lambda seed, i: numeric.draw(seed, FAMILIES[i % len(FAMILIES)], NOISE, corrupted=True),
    "sequences": lambda seed, i: symbols.draw_sequence(seed),
    "sequences, composed": lambda seed, i: symbols.draw_sequence(seed, composed=True),
    "units": lambda seed, i: symbols.draw_unit(seed),
    "units, noisy": lambda seed, i: symbols.draw_unit(seed, noise=NOISE),
    "units, composed": lambda seed, i: symbols.draw_unit(seed, "and" if i % 2 else "or"),
    "units, corrupted": lambda seed, i: symbols.draw_unit(seed, "except"),
}
# Interpreters of numeric functions, from a seed.
PROBES: dict[str, Callable[[int], Interpreter]] = {
    "random": lambda seed: interpreters.Probing(seed),
    "random, interval": lambda seed: interpreters.Probing(seed, interval=True),
    "even, interval": lambda seed: interpreters.Probing(seed, interpreters.even, interval=True),
    "adaptive": lambda seed: interpreters.Adaptive(seed),
}


def study(save: Callable[[dict[str, Any]], None], *, seeds: range = range(10, 13)) -> list[Bar]:
    """Every kind by every interpreter of its own, from every seed."""
    about = {"seeds": list(seeds), "config": {"budget": BUDGET, "functions": COUNT, "noise": NOISE}}
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for kind in KINDS:
            rows += [{"seed": seed, "kind": kind, **row} for row in measure(kind, seed, COUNT)]
            save({**about, "rows": rows, "bars": bars(rows)})
        print(f"seed {seed}", *(row for row in rows if row["seed"] == seed), sep="\n", flush=True)
    return bars(rows)


def makers(kind: str) -> Mapping[str, Callable[[int], Interpreter]]:
    """The interpreters of a kind."""
    if kind.startswith("numeric"):
        return PROBES
    table = symbols.UNITS if kind.startswith("units") else symbols.SEQUENCES
    return {"search": lambda seed: interpreters.Search(table, seed)}


def measure(kind: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Mean scores over `count` functions for every interpreter; the seeds of functions and interpreters differ."""
    rows = []
    own = [1000 * seed + i for i in range(count)]
    for name, make in makers(kind).items():
        scores = [examine(KINDS[kind](n, i), make(n), BUDGET)[1] for i, n in enumerate(own)]
        rows.append({"interpreter": name, **{field: _mean(getattr(s, field) for s in scores) for field in FIELDS}})
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The bars, once there are corrupted functions."""
    arm = lambda name: [row for row in rows if (row["kind"], row["interpreter"]) == ("numeric, corrupted", name)]
    random, adaptive = arm("random"), arm("adaptive")
    if not random:
        return []
    gain = [b["inside"] - a["inside"] for a, b in zip(random, adaptive, strict=True)]
    return [
        judge("random probing outside of the corruption", [row["outside"] for row in random], LEAST_OUTSIDE),
        judge("random probing inside", [row["inside"] for row in random], MOST_INSIDE, at_most=True),
        judge("adaptive over random probing inside", gain, OVER_RANDOM),
    ]


def section(result: dict[str, Any]) -> str:
    """A row for every kind and interpreter, the mean of the seeds with the least and the largest."""
    lines = ["| functions | interpreter | overall | outside | inside | template |", "|---|---|---|---|---|---|"]
    for kind, name in dict.fromkeys((row["kind"], row["interpreter"]) for row in result["rows"]):
        own = [row for row in result["rows"] if (row["kind"], row["interpreter"]) == (kind, name)]
        cells = [ranged([row[field] for row in own if row[field] is not None]) for field in FIELDS]
        lines.append(f"| {kind} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
