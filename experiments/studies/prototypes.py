"""Is a classifier by prototypes as good as a linear one, and are its prototypes examples? Digits, row by row.

    python -m experiments.study --study=prototypes --workdir=runs/prototypes --check

Trains the recipe `configs/interp/prototypes.py` from every seed in three arms: as it is, with the linear head, and
without the term that pulls every prototype to an example. The last step of each is tested; the prototypes are compared
with all training examples (`experiments.evaluation.prototypes`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs import base
from configs.interp import prototypes as recipe
from experiments.evaluation.prototypes import cases
from experiments.evaluation.seeds import run_seed
from experiments.studies.protocol import Bar, judge, ranged
from experiments.training.restore import load

FOLDER = "insight"
HEADS: dict[str, Callable[[], Any]] = {
    "prototypes": lambda: base.head("prototypes"),
    "linear": lambda: base.head("linear"),
    "without_nearest_example": lambda: base.head("prototypes", nearest_example=0.0),
}
NAMES = {"prototypes": "prototypes", "linear": "linear head", "without_nearest_example": "without `nearest_example`"}
COLUMNS = (("accuracy", 3), ("closeness", 3), ("agreement", 2))  # and digits

# The bars, in the worst seed.
LEAST_OVER_LINEAR = -0.015  # test accuracy over that of the linear head
MOST_CLOSENESS = 0.05  # mean_j min_i |p_j - z_i|^2 over the variance of z
LEAST_TIMES_CLOSER = 5.0  # than without the term
LEAST_AGREEMENT = 0.9  # share of prototypes that vote for the class of their nearest training example


def study(
    save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(10, 13), steps: int | None = None
) -> list[Bar]:
    """Every arm from every seed; `steps` other than the recipe's."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for arm in HEADS:
            rows.append(measured(arm, seed, workdir / arm / f"seed_{seed}", steps))
            save({"seeds": list(seeds), "config": config(arm, seed, steps), "rows": rows, "bars": bars(rows)})
            print(rows[-1], flush=True)
    return bars(rows)


def config(arm: str, seed: int, steps: int | None) -> dict[str, Any]:
    values = recipe.get_config()
    values.model.head, values.seed = HEADS[arm](), seed
    if steps is not None:
        values.train.update(steps=steps, evaluate_every=steps)
    return values.to_dict()


def measured(arm: str, seed: int, directory: Path, steps: int | None) -> dict[str, Any]:
    """One run: its test accuracy, and what its prototypes are."""
    result = run_seed(config(arm, seed, steps), directory)
    row = {"arm": arm, "seed": seed, "step": result["step"], "accuracy": result["accuracy"], "loss": result["loss"]}
    if arm == "linear":
        return row
    found = cases(load(directory))
    return {**row, "closeness": found.closeness, "agreement": found.agreement, "variance": found.variance}


def section(result: Mapping[str, Any]) -> str:
    """A row for every arm, means over seeds with the range."""
    lines = ["| arm | test accuracy | distance of prototypes / variance | votes for the class of the nearest example |"]
    lines.append("|---|---|---|---|")
    for arm, name in NAMES.items():
        own = [row for row in result["rows"] if row["arm"] == arm]
        cells = [ranged([row[field] for row in own if field in row], digits) for field, digits in COLUMNS]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Over the seeds of which all arms are there."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["arm"]] = row
    whole = [arms for arms in by_seed.values() if len(arms) == len(HEADS)]
    if not whole:
        return []
    own = [arms["prototypes"] for arms in whole]
    over = [arms["prototypes"]["accuracy"] - arms["linear"]["accuracy"] for arms in whole]
    times = [arms["without_nearest_example"]["closeness"] / arms["prototypes"]["closeness"] for arms in whole]
    return [
        judge("accuracy over the linear head", over, LEAST_OVER_LINEAR),
        judge("distance of prototypes over the variance", [row["closeness"] for row in own], MOST_CLOSENESS, True),
        judge("times that distance without the term", times, LEAST_TIMES_CLOSER),
        judge("votes for the class of the nearest example", [row["agreement"] for row in own], LEAST_AGREEMENT),
    ]
