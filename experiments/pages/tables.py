"""Tables inside a page that is otherwise written by hand: the lines between

    <!-- table: NAME -->
    <!-- end of table -->

are made from NAME.json of `experiments.evaluation.table`: a row for every arm, with the test score of each seed, and
the activation rate that was asked and got if all arms have one. Without the file, the lines say so. Those between

    <!-- arms: NAME OTHER ... -->
    <!-- end of arms -->

have the arms of several such files in one table: what an active token can read, parameters, activation and score.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError

BLOCK = re.compile(r"(<!-- (table|arms): ([\w ]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def fill(text: str, directory: Path) -> str:
    """The page with all its tables made anew. Raises UserError for a file that is not of sweeps."""

    def made(found: re.Match) -> str:
        head, kind, names, end = found.groups()
        tables = {}
        for path in (directory / f"{name}.json" for name in names.split()):
            if not path.exists():
                return f"{head}\nNot run yet.\n\n{end}"
            try:
                tables[path.name] = json.loads(path.read_text())
                lines = arms(tables) if kind == "arms" else table(tables[path.name], path.name)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is not a table of experiments.sweep: {error!r}") from error
        return head + lines + end

    return BLOCK.sub(made, text)


def arms(tables: dict[str, Any]) -> str:
    """A row for every arm of every file, those with the highest mean first; with its file, if there are several."""
    metrics = {run["test"][-1]["selection_metric"]: None for runs in tables.values() for run in runs.values()}
    scored = " or ".join(metrics).replace("_", " ")
    head = f"| arm | attention | parameters | activation: mean, range | {scored}: mean ± s.e. | lowest | seeds |"
    files = len(tables) > 1
    lines, rows = ["", head + " of |" * files, "|" + "---|" * (7 + files)], []
    for file, runs in tables.items():
        for label, run in runs.items():
            metric, model = run["test"][-1]["selection_metric"], run["config"]["model"]
            name, _, score, lowest, activation = _row(label, run, metric)
            seeds = sum(value is not None for value in run["metrics"][metric]["values"])
            cells = [name, _sees(model), f"{run['test'][-1]['parameters']:,}", activation, score, lowest, str(seeds)]
            cells += [file.removesuffix(".json")] * files
            rows.append((run["metrics"][metric]["mean"], "| " + " | ".join(cells) + " |"))
    lines += [row for _, row in sorted(rows, key=lambda row: row[0], reverse=True)]
    sources = ", ".join(f"[{name}](_data/results/{name})" for name in tables)
    return "\n".join([*lines, "", f"{made_on(next(iter(runs.values())))}; {sources}.", ""]) + "\n"


def _sees(model: dict[str, Any]) -> str:
    """What an active token can read."""
    if model["block"] == "mega":
        return f"chunks of {model['chunk']}"
    if model["activation"] == "never" or model.get("attention") is False:
        return "none"
    return "everything" if model["window_size"] is None else f"{model['window_size']} keys"


def table(runs: dict[str, Any], name: str) -> str:
    """Score of each seed, mean and standard error, and the mean and range of the activation rate."""
    first = next(iter(runs.values()))
    metric = first["test"][-1]["selection_metric"]
    head = ["arm", f"{metric.replace('_', ' ')} by seed", "mean ± s.e.", "lowest"]
    head += ["activation: mean of layers and seeds, range"]
    rows = [_row(label, run, metric) for label, run in runs.items()]
    if all(_asked(run) for run in runs.values()):
        head += ["asked", "got by seed", "largest deviation"]
        rows = [row + _rates(run) for row, run in zip(rows, runs.values(), strict=True)]
    lines = ["", *("| " + " | ".join(cells) + " |" for cells in (head, *rows))]
    lines.insert(2, "|" + "---|" * len(head))
    seeds = f"Seeds from {first['seeds'][0]}; where scores are missing, a seed was not run."
    lines += ["", f"{seeds} {made_on(first)}; [{name}](_data/results/{name}).", ""]
    return "\n".join(lines) + "\n"


def for_readers(command: str) -> str:
    """A recorded command that does not overwrite the project's own files."""
    return re.sub(r"--out=docs/_data/\w+/", "--out=runs/", command)


def made_on(run: dict[str, Any]) -> str:
    """Hardware and versions of a run."""
    versions = ", ".join(f"{package} {run['versions'][package]}" for package in ("python", "jax", "flax"))
    return f"{run['hardware']}; {versions}"


def _row(label: str, run: dict[str, Any], metric: str) -> list[str]:
    spread, rates = run["metrics"][metric], _got(run)
    scores = " ".join("-" if value is None else f"{value:.3f}" for value in spread["values"])
    known = [value for value in spread["values"] if value is not None]
    error = f"{spread['mean']:.3f} ± {spread['standard_error']:.3f}" if spread["standard_error"] else "-"
    activation = f"{statistics.fmean(rates):.2f}, {min(rates):.2f} to {max(rates):.2f}" if rates else "-"
    return [label.replace("_", " "), scores, error, f"{min(known, default=0):.3f}", activation]


def _rates(run: dict[str, Any]) -> list[str]:
    asked, got = float(_asked(run) or 0), _got(run)
    return [f"{asked:g}", " ".join(f"{rate:.3f}" for rate in got), f"{max(abs(rate - asked) for rate in got):.3f}"]


def _asked(run: dict[str, Any]) -> float | None:
    return run["config"].get("model", {}).get("router", {}).get("target_rate")


def _got(run: dict[str, Any]) -> list[float]:
    """The mean activation rate of all layers, for each seed."""
    return [statistics.fmean(layers) for layers in run["activation_rate"] if layers]
