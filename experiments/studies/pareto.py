"""One hypernetwork for every price of attention, beside models trained at one price each.

    python -m experiments.study --study=pareto_copy --out=docs/hypernetworks/pareto_copy --workdir=runs/pareto

Trains, by `experiments.train`'s own loop, the hypernetwork and, without one, a model at each of five prices, and tests
the last step of each: accuracy and activation rate, the hypernetwork's at every price of a finer grid. Finished runs in
the work directory are not trained again.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.evaluation.seeds import train_whole
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import build
from experiments.training.loop import evaluate
from experiments.training.metrics import plain
from experiments.training.restore import CHECKPOINTS, load

PRICES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = tuple(np.linspace(0, 1, 9).tolist())


def study(name: str, seeds: range, directory: Path, save: Callable[[dict[str, Any]], None]) -> None:
    """Of configs/hyper/NAME.py, from every seed. Raises Stopped where a run is asked to stop."""
    get_config = importlib.import_module(f"configs.hyper.{name}").get_config
    runs: list[dict[str, Any]] = []
    configs: dict[str, Any] = {}
    for seed in seeds:
        configs["mip"] = {**get_config("mip").to_dict(), "seed": seed}
        workdir = directory / f"{name}_mip_{seed}"
        train_whole(build(configs["mip"]), workdir, workdir.name)
        runs += [{"arm": "mip", "seed": seed, "penalty": price, **test(workdir, price)} for price in GRID]
        for price in PRICES:
            values = {**get_config("separate").to_dict(), "seed": seed}
            values["train"]["activation_penalty"] *= price
            workdir = directory / f"{name}_separate_{price}_{seed}"
            train_whole(build(values), workdir, workdir.name)
            runs.append({"arm": "separate", "seed": seed, "penalty": price, **test(workdir, None)})
            configs["separate"] = values
            save({"runs": runs, "config": configs})


def test(workdir: Path, price: float | None) -> dict[str, Any]:
    """Accuracy, loss and activation rate by layer on the test split, of the newest step: at one price, if given."""
    with Checkpoints(workdir / CHECKPOINTS, read_only=True) as checkpoints:
        newest = checkpoints.steps()[-1]
    run = load(workdir, newest)
    experiment = run.experiment
    task: Any = experiment.task
    batches = task.evaluation_batches("test")
    if price is not None:
        batches = (task.at(batch, np.array([price], np.float32)) for batch in task.task.evaluation_batches("test"))
    values = evaluate(jax.jit(experiment.steps.evaluate), run.variables, batches)
    return {name: plain(values[name]) for name in ("accuracy", "loss", "activation_rate")} | {"step": run.step}
