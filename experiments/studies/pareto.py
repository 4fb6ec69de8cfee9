"""One hypernetwork for every price of attention, beside models trained at one price each.

    python -m experiments.studies.pareto --config=copy --out=docs/hypernetworks/pareto_copy --workdir=runs/pareto

Trains, by `experiments.train`'s own loop, the hypernetwork and, without one, a model at each of five prices, and tests
the last step of each: accuracy and activation rate, the hypernetwork's at every price of a finer grid. Finished runs in
the work directory are not trained again.
"""

import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, distributed
from experiments.build import build
from experiments.checkpoints import Checkpoints
from experiments.evaluation import write_json
from experiments.loop import evaluate, hardware, train, versions
from experiments.reporting import plain
from experiments.restore import CHECKPOINTS, load

_CONFIG = flags.DEFINE_enum("config", "copy", ["copy", "listops"], "configs/hyper/pareto_NAME.py")
_OUT = flags.DEFINE_string("out", None, "Path of the JSON file, without suffix.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs are.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "The seeds of every run.")
_ARMS = flags.DEFINE_list("arms", ["mip"], "The hypernetworks: arms of configs/hyper/arms.py.")

PRICES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = tuple(np.linspace(0, 1, 9).tolist())


def main() -> None:
    cli.use_compilation_cache()
    cli.keep_memory()
    distributed.initialize()
    get_config = importlib.import_module(f"configs.hyper.pareto_{_CONFIG.value}").get_config
    result: dict[str, Any] = {"versions": versions(), "hardware": hardware(), "runs": []}
    seeds, out = [int(seed) for seed in _SEEDS.value], Path(f"{_OUT.value}.json")
    result["command"] = (
        f"python -m experiments.studies.pareto --config={_CONFIG.value} --seeds={','.join(_SEEDS.value)}"
    )
    for seed in seeds:
        for arm in _ARMS.value:
            values = {**get_config(arm).to_dict(), "seed": seed}
            workdir = Path(_WORKDIR.value) / f"{_CONFIG.value}_{arm}_{seed}"
            train(build(values), workdir)
            for price in GRID:
                result["runs"].append({"arm": arm, "seed": seed, "price": price, **test(workdir, price)})
            result.setdefault("config", {})[arm] = values
            write_json(out, result)
        for price in PRICES:
            values = {**get_config("separate").to_dict(), "seed": seed}
            values["train"] = {**values["train"], "activation_price": price * values["train"]["activation_price"]}
            workdir = Path(_WORKDIR.value) / f"{_CONFIG.value}_separate_{price}_{seed}"
            train(build(values), workdir)
            result["runs"].append({"arm": "separate", "seed": seed, "price": price, **test(workdir, None)})
            result["config"]["separate"] = values
            write_json(out, result)


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


if __name__ == "__main__":
    cli.run(main)
