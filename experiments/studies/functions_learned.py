"""Can an interpreter name the function that a SeqBoat has learned? The truth is known, up to the model's mistakes.

    python -m experiments.study --study=functions_learned --workdir=runs/functions_learned

Trains `configs/synthetic/symbol_function.py:credit_router` on functions of sequences from every seed, and lets the
search of `seqboat.interp.functions` ask the trained model, and the function itself, at most `BUDGET` inputs. Both
answers are scored on the function.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.synthetic import symbol_function as recipe
from experiments.evaluation.seeds import train_whole
from experiments.studies.functions import BUDGET
from experiments.studies.protocol import ranged
from experiments.tasks.symbol_function import FIRST_ANSWER, ask
from experiments.training.experiment import build
from experiments.training.restore import Run, load
from experiments.training.step import apply
from seqboat.interp.functions.interpreters import Search
from seqboat.interp.functions.protocol import Description, Function, Score, examine
from seqboat.interp.functions.symbols import LENGTH, SEQUENCES, TESTS, SymbolFunction, inputs

FOLDER = "insight"
# Templates with their numbers.
FUNCTIONS: dict[str, tuple[int, ...]] = {
    "reverse": (),
    "shift": (3,),
    "dedupe": (),
    "count": (2,),
    "shift then reverse": (2,),
}


class Learned:
    """A run of the task `symbol_function` as a function: `seqboat.interp.functions.protocol.Function`."""

    def __init__(self, run: Run):
        self.truth: SymbolFunction = run.task.config.function
        answer = lambda variables, batch: apply(run.model, variables, batch, False, ())[0].logits.argmax(-1)
        self._variables, self._answer = run.variables, jax.jit(answer)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """What the model answers (N, LENGTH) to x (N, LENGTH)."""
        ids = ask(x).astype(np.int32)
        found = self._answer(self._variables, {"inputs": ids, "lengths": np.full(len(ids), 2 * LENGTH, np.int32)})
        return np.asarray(found)[:, LENGTH:] - FIRST_ANSWER

    def score(self, description: Description) -> Score:
        """On the function that the model was trained on."""
        return self.truth.score(description)


def study(
    save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(10, 13), steps: int | None = None
) -> None:
    """Every function from every seed; `steps` other than the recipe's."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for template in FUNCTIONS:
            values = config(template, seed, steps)
            where = workdir / template.replace(" ", "_") / f"seed_{seed}"
            train_whole(build(values), where, f"{template} of seed {seed}")
            rows.append({"seed": seed, "function": template, **measured(load(where, values["train"]["steps"]), seed)})
            save({"seeds": list(seeds), "budget": BUDGET, "config": values, "rows": rows})
            print(rows[-1], flush=True)


def config(template: str, seed: int, steps: int | None) -> dict[str, Any]:
    values = recipe.get_config("credit_router")
    values.task.update(template=template, numbers=FUNCTIONS[template])
    values.seed = seed
    if steps is not None:
        values.train.update(steps=steps, evaluate_every=steps)
    return values.to_dict()


def measured(run: Run, seed: int) -> dict[str, Any]:
    """The share of inputs that the model answers `wholly` right, and of single `elements`; what the search says of the
    model and of the function, with the share of inputs on which that is right."""
    learned = Learned(run)
    x = inputs(TESTS, np.random.default_rng((seed, 3)))
    right = learned(x) == learned.truth.values(x)
    row: dict[str, Any] = {"wholly": float(right.all(1).mean()), "elements": float(right.mean())}
    functions: dict[str, Function] = {"model": learned, "function": learned.truth}
    for name, function in functions.items():
        description, score = examine(function, Search(SEQUENCES, seed), BUDGET)
        row |= {f"said of the {name}": description.text, f"{name} agrees": score.overall}
    return row


def section(result: Mapping[str, Any]) -> str:
    """A row for every function, the mean of the seeds with the least and the largest."""
    lines = [
        "| function | the model: wholly right | single answers | search of the model: named, right | of the function |"
    ]
    lines.append("|---|---|---|---|---|")
    for name in dict.fromkeys(row["function"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["function"] == name]
        of = lambda field, own=own: ranged([row[field] for row in own])
        numbers = ", ".join(map(str, FUNCTIONS[name]))
        exact = sum(row["said of the model"] == f"{name} ({numbers})" for row in own)
        shown = f"{name} ({numbers})" if numbers else name
        cells = [
            shown,
            of("wholly"),
            of("elements"),
            f"{exact} of {len(own)}, {of('model agrees')}",
            of("function agrees"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
