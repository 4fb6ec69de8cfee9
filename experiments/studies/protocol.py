"""What a study is: a file of this folder with a function `study`, and FOLDER, where its JSON goes below docs/_data.

    FOLDER = "insight"

    def study(save, *, workdir, seeds=range(10, 13)) -> list[Bar]:
        save({"rows": rows})  # the whole result so far, after every part
        return [judge("accuracy", [row["accuracy"] for row in rows], 0.9)]

Its keyword arguments are the flags that it reads, with its defaults: `seeds` a range, `steps` a number, `arms` a list
of names, `workdir` a Path, without a default. Any other flag is refused. A study without bars is annotated `-> None`.
With `ROWS = True` its result is a table of docs/claims.md, each row with its own command, versions and hardware.
`section(result) -> str` may make Markdown of the JSON, for `experiments.pages.studies`, which adds the bars.
"""

import inspect
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import ModuleType
from typing import Any, TypedDict

from experiments.common.errors import UserError
from experiments.common.plugs import defining, find

STUDIES = "experiments.studies"


class Bar(TypedDict):
    """A value against a bar that was fixed beforehand."""

    name: str
    value: float
    bar: float
    at_most: bool
    met: bool


def judge(name: str, values: Sequence[float], bar: float, at_most: bool = False) -> Bar:
    """The worst value against a bar, which is the least that meets it, or with `at_most` the most."""
    value = max(values) if at_most else min(values)
    return Bar(name=name, value=value, bar=bar, at_most=at_most, met=value <= bar if at_most else value >= bar)


def verdict(bar: Bar) -> str:
    """One line: the value, the bar, and whether it is met."""
    limit = "at most" if bar["at_most"] else "at least"
    return f"{'met' if bar['met'] else 'NOT MET'}: {bar['name']}: {bar['value']:.3f}, {limit} {bar['bar']:g}"


def ranged(values: Sequence[float], digits: int = 2) -> str:
    """A cell of a table: the mean over seeds, with the least and the largest value; empty without values."""
    if not values:
        return ""
    mean, least, largest = (f"{value:.{digits}f}" for value in (fmean(values), min(values), max(values)))
    return f"{mean} ({least} to {largest})"


def find_study(name: str) -> ModuleType:
    """The module of a study. Raises UserError for another name, with those that there are."""
    studies = defining(STUDIES, "study")
    if name not in studies:
        raise UserError(f"--study={name}: unknown study; choose from {', '.join(studies)}")
    return find(STUDIES, name, "--study", "study", "FOLDER")


def arguments(module: ModuleType, flags: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """The keyword arguments of a study from the flags that are not None. Raises UserError for a flag that it does not
    read, and for one that it needs."""
    name, signature = module.__name__.rpartition(".")[2], inspect.signature(module.study)
    reads = {flag: parameter.default for flag, parameter in signature.parameters.items() if flag in flags}
    given = {flag: value for flag, value in flags.items() if value is not None}
    if strange := sorted(set(given) - set(reads)):
        raise UserError(f"--{strange[0]}: the study {name} does not read it; remove it")
    if check and signature.return_annotation is None:
        raise UserError(f"--check: the study {name} has no bars; remove it")
    if reads.get("workdir") is inspect.Parameter.empty and "workdir" not in given:
        raise UserError(f"--workdir=DIR is missing: the directory for the runs of {name}")
    if "seeds" in given:
        first = reads["seeds"][0]
        given["seeds"] = range(first, first + given["seeds"])
    return given


def stamped(module: ModuleType, result: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """A result with its command, versions and hardware; in every row, if its rows are of a table."""
    if getattr(module, "ROWS", False):
        return {name: {**about, **row} for name, row in result.items()}
    return {**about, **result}
