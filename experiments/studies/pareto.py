"""One hypernetwork for every activation penalty, against models trained at one penalty each.

    python -m experiments.study --study=pareto_copy --workdir=runs/pareto

Trains the hypernetwork and, without one, a model at each of five penalties, by the loop of `experiments.train`, and
tests the last step of each: accuracy and activation rate, for the hypernetwork on a finer grid of penalties. Finished
runs in the work directory are reused.
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

PENALTIES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = tuple(np.linspace(0, 1, 9).tolist())


def compare(name: str, save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(3)) -> None:
    """Runs configs/hyper/NAME.py from every seed. Raises Stopped if a run is asked to stop."""
    get_config = importlib.import_module(f"configs.hyper.{name}").get_config
    runs: list[dict[str, Any]] = []
    configs: dict[str, Any] = {}
    for seed in seeds:
        configs["mip"] = {**get_config("mip").to_dict(), "seed": seed}
        run = workdir / f"{name}_mip_{seed}"
        train_whole(build(configs["mip"]), run, run.name)
        runs += [{"arm": "mip", "seed": seed, "penalty": penalty, **test(run, penalty)} for penalty in GRID]
        for penalty in PENALTIES:
            values = {**get_config("separate").to_dict(), "seed": seed}
            values["train"]["activation_penalty"] *= penalty
            run = workdir / f"{name}_separate_{penalty}_{seed}"
            train_whole(build(values), run, run.name)
            runs.append({"arm": "separate", "seed": seed, "penalty": penalty, **test(run, None)})
            configs["separate"] = values
            save({"runs": runs, "config": configs})


def test(workdir: Path, penalty: float | None) -> dict[str, Any]:
    """Test accuracy, loss and activation rate by layer of the newest step, at one penalty if given."""
    with Checkpoints(workdir / CHECKPOINTS, read_only=True) as checkpoints:
        newest = checkpoints.steps()[-1]
    run = load(workdir, newest)
    experiment = run.experiment
    task: Any = experiment.task
    batches = task.evaluation_batches("test")
    if penalty is not None:
        batches = (task.at(batch, np.array([penalty], np.float32)) for batch in task.task.evaluation_batches("test"))
    values = evaluate(jax.jit(experiment.functions.evaluate), run.variables, batches)
    return {name: plain(values[name]) for name in ("accuracy", "loss", "activation_rate")} | {"step": run.step}
