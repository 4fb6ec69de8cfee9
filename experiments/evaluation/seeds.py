"""Training, testing and summarising one config from several seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.common.config import differences
from experiments.common.errors import Stopped, UserError
from experiments.common.files import write_json
from experiments.common.spread import spread
from experiments.evaluation.evaluator import evaluate_run, read_result
from experiments.training.checkpoints import Checkpoints
from experiments.training.claims import owned
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train
from experiments.training.restore import CHECKPOINTS

SUMMARY_FILE = "seeds.json"


def run_seeds(
    values: dict[str, Any],
    workdir: Path,
    count: int,
    split: str = "test",
    shown: Callable[[dict[str, Any]], None] = lambda summary: None,
) -> dict[str, Any]:
    """Trains and evaluates a config from `count` seeds, the config's own first, in workdir/seed_N; finished seeds are
    reused. Calls `shown`, then writes mean, standard deviation and standard error of every metric to
    `workdir/seeds.json`. If asked to stop, raises Stopped and writes no summary.
    """
    results = []
    for seed in range(values["seed"], values["seed"] + count):
        results.append(run_seed({**values, "seed": seed}, workdir / f"seed_{seed}", split))
    summary: dict[str, Any] = {"seeds": [result["config"]["seed"] for result in results], "split": split}
    summary |= {f"{name}s": [result[name] for result in results] for name in ("step", "seal")}
    summary["metrics"] = {
        name: {"values": found, **spread(found)}
        for name in results[0]
        if name not in ("seconds", "step", "seal", "at")
        and isinstance((found := [result[name] for result in results])[0], float | None)
    }
    summary["activation_rate"] = [result.get("activation_rate") for result in results]
    summary |= {
        name: results[0][name] for name in ("selection_metric", "baseline", "baseline_name", "versions", "hardware")
    }
    summary["config"] = values
    shown(summary)
    write_json(workdir / SUMMARY_FILE, summary)
    return summary


def run_seed(values: dict[str, Any], directory: Path, split: str = "test") -> dict[str, Any]:
    """Trains and evaluates one config; what is there of this run already, is not done again. Raises UserError for a
    directory with a run of another config, InUse for one in which another process works, Stopped if asked to stop."""
    _refuse_another_config(directory, values)
    with owned(directory):  # also while it is evaluated
        if found := finished(values, directory, split):
            return found
        train_whole(build(values), directory, f"seed {values['seed']}")
        return evaluate_run(directory, split)


def finished(values: dict[str, Any], directory: Path, split: str = "test") -> dict[str, Any] | None:
    """The evaluation of the best step of a run that is at its last step, if it has been written."""
    if not (directory / CHECKPOINTS).is_dir():
        return None
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    if not steps or steps[-1] < values["train"]["steps"]:
        return None
    found = [read_result(path, directory) for path in sorted(directory.glob(f"evaluation_{split}_*.json"))]
    return next((result for result in found if result and result.get("best") and "parameter_dtype" not in result), None)


def train_whole(experiment: Experiment, workdir: Path, what: str, init_from: str | None = None) -> None:
    """Trains one of several runs, from the parameters of another run or from scratch. Raises Stopped if asked to stop
    before its last step, since that is for all of them."""
    ended = train(experiment, workdir, init_from)
    if ended.stopped:
        raise Stopped(
            f"asked to stop: {what} is at step {ended.step} of {experiment.config.train.steps}; no summary is written, "
            "run the same command to resume"
        )


def _refuse_another_config(workdir: Path, values: dict[str, Any]) -> None:
    """Raises UserError unless the seeds of a table share one config, apart from data locations and the mesh."""
    if not (workdir / CHECKPOINTS).is_dir():
        return
    with Checkpoints(workdir / CHECKPOINTS, read_only=True) as checkpoints:
        if not checkpoints.steps():
            return
        before = checkpoints.read_meta().get("config")
    same = {name: (before or {}).get(name) for name in ("data_dir", "mesh")}
    changed = differences(before, {**values, **same})
    if changed:  # unless the data decide the field, which then only the task knows
        changed = differences(before, {**build(values).values, **same})
    if changed:
        raise UserError(f"{workdir} was trained with another config ({changed[0]}): choose another work directory")
