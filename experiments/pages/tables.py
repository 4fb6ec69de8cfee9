"""Tables inside a page that is otherwise written by hand: the lines between

    <!-- table: NAME -->
    <!-- end of table -->

are made from NAME.json of `experiments.evaluation.table`: a row for every arm, with the test score of each seed.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fill(text: str, directory: Path) -> str:
    """The page with all its tables made anew. Raises UserError for a file that is missing or not of sweeps."""

    def made(found: re.Match) -> str:
        path = directory / f"{found[2]}.json"
        try:
            return found[1] + table(json.loads(path.read_text()), path.name) + found[3]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a table of experiments.sweep: {error!r}") from error

    return BLOCK.sub(made, text)


def table(runs: dict[str, Any], name: str) -> str:
    """Score of each seed, mean and standard error, and the mean and range of the activation rate."""
    first = next(iter(runs.values()))
    metric = first["test"][-1]["selection_metric"]
    lines = [f"\n| arm | {metric} by seed | mean ± s.e. | lowest | activation: mean of layers and seeds, range |"]
    lines += ["|---|---|---|---|---|"]
    for label, run in runs.items():
        spread = run["metrics"][metric]
        scores = " ".join("-" if value is None else f"{value:.3f}" for value in spread["values"])
        rates = [statistics.fmean(layers) for layers in run["activation_rate"] if layers]
        activation = f"{statistics.fmean(rates):.2f}, {min(rates):.2f} to {max(rates):.2f}" if rates else "-"
        known = [value for value in spread["values"] if value is not None]
        error = f"{spread['mean']:.3f} ± {spread['standard_error']:.3f}" if spread["standard_error"] else "-"
        lines.append(f"| {label.replace('_', ' ')} | {scores} | {error} | {min(known, default=0):.3f} | {activation} |")
    versions = ", ".join(f"{package} {first['versions'][package]}" for package in ("python", "jax", "flax"))
    seeds = f"Seeds from {first['seeds'][0]}; where scores are missing, a seed was not run."
    lines += ["", f"{seeds} {first['hardware']}; {versions}; [{name}](_data/results/{name}).", ""]
    return "\n".join(lines) + "\n"
