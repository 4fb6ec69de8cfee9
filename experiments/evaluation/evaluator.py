"""What a trained run is worth: its best checkpoint on a split, once, as a table and a JSON file; and over seeds.

A result names, by `seal`, the checkpoint that it is of, and is shown as no other's (`read_result`).
"""

import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from rich.table import Table

from experiments.common import terminal
from experiments.common.config import differences
from experiments.common.errors import Stopped, UserError
from experiments.evaluation.examples import compare, per_class, score, sha256, standard_errors, verdict
from experiments.training import manifest
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import Experiment, build
from experiments.training.loop import hardware, train, versions
from experiments.training.metrics import plain
from experiments.training.restore import CHECKPOINTS, has_hyper, load
from experiments.training.step import means

SUMMARY_FILE = "seeds.json"


def evaluate_run(workdir: Path, split: str = "test", *arguments: Any, **options: Any) -> dict:
    """`measure_run`, written to `result_file` in the work directory."""
    refuse_unwritable(workdir)
    result = measure_run(workdir, split, *arguments, **options)
    write_json(workdir / result_file(result), result)
    return result


def measure_run(
    workdir: Path,
    split: str = "test",
    step: int | None = None,
    data_dir: str | None = None,
    against: Path | None = None,
    *,
    at: tuple[float, ...] | None = None,
    streams: int | None = None,
) -> dict:
    """Evaluates a step, the best one by default.

    `against` is the work directory of another run, whose best step is compared example by example. `at`: the
    hyper-input, where a hypernetwork generates the parameters; by default the mean over those of `config.hyper`.
    `streams`: a corpus is read in one pass with carried state, cut into so many; 1 gives every byte all before it.
    """
    run = load(workdir, step, data_dir, at)
    other = None if against is None else load(against, None, data_dir, at if has_hyper(against) else None)
    task = run.task
    began = time.monotonic()
    scores = score(run, split, streams)
    seconds = time.monotonic() - began
    result = {
        "step": run.step,
        "seal": seal(workdir, run.step),
        "best": run.best and at is None,
        "at": at,
        "split": split,
        "protocol": "every example by itself" if streams is None else "one pass with carried state",
        **({} if streams is None else {"streams": streams}),
        **{name: plain(value) for name, value in means(scores.total).items()},
    }
    result |= {"examples": len(scores.digests), "examples_sha256": sha256(scores.digests)}
    result["standard_errors"] = {name: plain(value) for name, value in standard_errors(scores.examples).items()}
    if "confusion" in scores.total:
        result["per_class"] = per_class(scores.total["confusion"][0])
    result |= {"headline": task.headline, "trivial": task.trivial(split), "trivial_answer": task.trivial_answer}
    if other is not None and against is not None:
        found = compare(scores, score(other, split, streams))
        # Bits are the loss in another unit.
        names = [task.headline] if task.headline == "bits" else dict.fromkeys((task.headline, "loss"))
        better = {task.headline: task.higher_is_better}
        said = [verdict(name, found[name], better.get(name, False), len(scores.digests)) for name in names]
        metrics = {
            name: {field: value if isinstance(value, str) else plain(value) for field, value in fields.items()}
            for name, fields in found.items()
        }
        result["against"] = {"workdir": str(against), "step": other.step, "seal": seal(against, other.step)}
        result["against"] |= {"metrics": metrics, "verdicts": said}
        result["against"] |= {"differences": differences(run.experiment.values, other.experiment.values)}
    if run.data_changes:
        result["data_changed"] = run.data_changes
    if other is not None and other.data_changes:
        result["against"]["data_changed"] = other.data_changes
    result |= {"throughput": scores.throughput, "seconds": seconds}
    result |= {"config": run.experiment.values, "versions": versions(), "hardware": hardware()}
    return result


def seal(workdir: Path, step: int) -> str:
    """What tells a checkpoint from every other: the hash of its seal, which has those of its files; or nothing."""
    path = workdir / CHECKPOINTS / str(step) / manifest.SEAL
    return manifest.sha256(path) if path.is_file() else ""


def read_result(path: Path, workdir: Path) -> dict[str, Any] | None:
    """A result of a checkpoint that `workdir` holds, or None where there is no file, or one of another run, config or
    step, which is logged. Raises UserError for what is no result.
    """
    if not path.exists():
        return None
    try:
        found = manifest.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again, or remove it") from error
    step = found.get("step")
    if type(step) is int and found.get("seal") and found["seal"] == seal(workdir, step):
        return found
    logging.warning("%s is left out: it is not a result of a checkpoint in %s; evaluate again", path, workdir)
    return None


def result_file(result: dict[str, Any]) -> str:
    """Where an evaluation is written in its work directory."""
    protocol = f"one_pass_{result['streams']}" if "streams" in result else "evaluation"
    at = "" if result["at"] is None else "_at_" + "_".join(f"{z:g}" for z in result["at"])
    return f"{protocol}_{result['split']}_{result['step']}{at}.json"


def show(result: dict[str, Any]) -> None:
    """The numbers of an evaluation as tables: metrics, classes and confusions where there are any, another run."""
    console = terminal.console()
    title = f"{result['config']['task']['name']}, {result['split']} split, step {result['step']}"
    table = Table("metric", title=title, title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name, value in result.items():
        if (
            name in ("step", "seal", "best", "at", "seconds", "elements", "data_changed")
            or isinstance(value, str | dict)
            or np.ndim(value) > 1
        ):
            continue
        error = result["standard_errors"].get(name)
        numbers = " ".join(map(_number, value)) if isinstance(value, list) else _number(value)
        table.add_row(name, numbers, "" if error is None else _number(error))
    for name, value in result["trivial"].items():
        table.add_row(f"{name}: {result['trivial_answer']}", _number(value))
    for name, rate in result["throughput"].items():
        table.add_row(name.replace("_per_second", " a second"), "-" if rate is None else f"{rate:,.1f}")
    console.print(table)
    if "confusion" in result:
        classes = [str(number) for number in range(len(result["confusion"]))]
        each = Table("class", title="each class: right of its answers, right of it, examples", title_justify="left")
        columns = ("precision", "recall", "support")
        for name in columns:
            each.add_column(name, justify="right")
        for name, *row in zip(classes, *(result["per_class"][column] for column in columns), strict=True):
            each.add_row(name, *map(_number, row[:2]), f"{row[2]:,.0f}")
        console.print(each)
        matrix = Table("class", *classes, title="answers to each class, percent of it", title_justify="left")
        for name, row in zip(classes, result["confusion"], strict=True):
            matrix.add_row(name, *("-" if share is None else f"{100 * share:.0f}" for share in row))
        console.print(matrix)
    if "against" in result:
        apart = "; ".join(result["against"]["differences"]) or "nothing but what training left to chance"
        for line in [*result["against"]["verdicts"], f"here -> there: {apart}"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def run_seeds(
    values: dict[str, Any],
    workdir: Path,
    count: int,
    split: str = "test",
    shown: Callable[[dict[str, Any]], None] = lambda summary: None,
) -> dict[str, Any]:
    """Trains and evaluates a config from `count` seeds, the config's own first, in workdir/seed_N; finished seeds are
    not trained again. Writes mean, standard deviation and standard error of every metric to `workdir/seeds.json`, after
    a call of `shown`. Raises Stopped, and writes no summary, where it is asked to stop.
    """
    results = []
    for seed in range(values["seed"], values["seed"] + count):
        directory = workdir / f"seed_{seed}"
        _refuse_another_config(directory, {**values, "seed": seed})
        train_whole(build({**values, "seed": seed}), directory, f"seed {seed}")
        results.append(evaluate_run(directory, split))
    summary: dict[str, Any] = {"seeds": [result["config"]["seed"] for result in results], "split": split}
    summary |= {f"{name}s": [result[name] for result in results] for name in ("step", "seal")}
    summary["metrics"] = {
        name: {"values": found, **_spread(found)}
        for name in results[0]
        if name not in ("seconds", "step", "seal", "at")
        and isinstance((found := [result[name] for result in results])[0], float | None)
    }
    summary["activation_rate"] = [result.get("activation_rate") for result in results]
    summary |= {name: results[0][name] for name in ("headline", "trivial", "trivial_answer", "versions", "hardware")}
    summary["config"] = values
    shown(summary)
    write_json(workdir / SUMMARY_FILE, summary)
    return summary


def train_whole(experiment: Experiment, workdir: Path, what: str) -> None:
    """One of several trainings. Raises Stopped where it was asked to stop before its last step: so are the others."""
    ended = train(experiment, workdir)
    if ended.stopped:
        raise Stopped(
            f"asked to stop: {what} is at step {ended.step} of {experiment.config.train.steps}; no summary is written, "
            "the same command resumes"
        )


def _refuse_another_config(workdir: Path, values: dict[str, Any]) -> None:
    """Seeds of one table have one config; where the data lie, and the mesh, are no part of it."""
    if not (workdir / CHECKPOINTS).is_dir():
        return
    with Checkpoints(workdir / CHECKPOINTS, read_only=True) as checkpoints:
        if not checkpoints.steps():
            return
        before = checkpoints.read_meta().get("config")
    same = {name: (before or {}).get(name) for name in ("data_dir", "mesh")}
    if changed := differences(before, {**values, **same}):
        raise UserError(f"{workdir} was trained with another config ({changed[0]}): take another work directory")


def write_json(path: Path, content: Any) -> None:
    """Atomic, and valid JSON throughout: null for what is not finite. Raises UserError where it cannot be written."""
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    """What JSON can hold of nested mappings, sequences and numbers."""
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def refuse_unwritable(directory: Path) -> None:
    """Raises UserError where no file can be made in a directory: before the hours of computing what would be in it."""
    if jax.process_index():
        return
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(f"could not write in {directory}: {error.strerror}; --out=FILE writes elsewhere") from error


def write_text(path: Path, text: str) -> None:
    """Atomic; of several processes the first writes. Raises UserError where it cannot."""
    if jax.process_index():
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two programs may write at once
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"could not write {path}: {error.strerror}") from error


def _spread(values: list[float | None]) -> dict[str, float | None]:
    """Mean, deviation of the sample and standard error of the mean: the last two None for one value, all of them if a
    value is None (not finite)."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return dict.fromkeys(("mean", "standard_deviation", "standard_error"))
    deviation = statistics.stdev(known) if len(known) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(known))
    return {"mean": statistics.fmean(known), "standard_deviation": deviation, "standard_error": error}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
