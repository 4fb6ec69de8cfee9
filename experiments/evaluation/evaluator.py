"""Evaluation of a run's best checkpoint on a split, as a table and a JSON file.

A result identifies its checkpoint by `seal`, and is never reported for another one (`read_result`).
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from rich.table import Table

from experiments.common import files, terminal
from experiments.common.config import differences
from experiments.common.errors import UserError, require
from experiments.common.files import refuse_unwritable, write_json
from experiments.common.provenance import hardware, versions
from experiments.evaluation import splicing
from experiments.evaluation.examples import Scores, compare, per_class, score, sha256, standard_errors, verdict
from experiments.training.metrics import plain
from experiments.training.restore import Run, bound, has_hyper, load, seal
from experiments.training.step import means
from seqboat.quantization import ParameterDtype, quantize


def evaluate_run(workdir: Path, split: str = "test", *arguments: Any, **options: Any) -> dict:
    """`measure_run` of a work directory, where it is also written to `result_file`."""
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
    parameter_dtype: ParameterDtype = "float32",
    splice: Path | None = None,
) -> dict:
    """Evaluates a step, the best one by default.

    `workdir` may be an exported file. `against` is another run, whose best step is compared example by example. `at` is
    the hyper-input of a hypernetwork; by default results are averaged over those of `config.hypernetwork`. `streams`
    reads a corpus in one pass with carried state, cut into N streams; with 1, every byte is scored given all bytes
    before it. With a `parameter_dtype` other than float32 (`seqboat.quantization`), the run is by default compared with
    itself in float32; with `splice`, the work directory of a dictionary of its activations (`splicing`), with itself
    without it.
    """
    if splice is not None:
        _refuse_beside_splice(at=at, streams=streams, parameter_dtype=parameter_dtype)
    run = load(workdir, step, data_dir, at)
    other = None if against is None else load(against, None, data_dir, at if has_hyper(against) else None)
    for each in (run, other):
        if each is not None:
            _ = each.experiment  # reads the data, before anything is computed
    if parameter_dtype != "float32":
        run, other, against = quantized(run, parameter_dtype), other or run, against or workdir
    whole, spliced = run, None if splice is None else splicing.of(run, splice)
    if spliced is not None:
        whole = bound(run)
        run, other, against = spliced.into(whole), other or whole, against or workdir
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
        "protocol": _protocol(streams, spliced),
        **({} if streams is None else {"streams": streams}),
        **({} if parameter_dtype == "float32" else {"parameter_dtype": parameter_dtype}),
        **{name: plain(value) for name, value in means(scores.total).items()},
    }
    result["parameters"] = run.parameters
    result |= {"examples": len(scores.digests), "examples_sha256": sha256(scores.digests)}
    result["standard_errors"] = {name: plain(value) for name, value in standard_errors(scores.examples).items()}
    if "confusion" in scores.total:
        counts = scores.total["confusion"][0]
        result["per_class"] = {"name": list(map(task.class_name, range(len(counts)))), **per_class(counts)}
    result |= {
        "selection_metric": task.selection_metric,
        "baseline": task.baseline(split),
        "baseline_name": task.baseline_name,
    }
    if other is not None and against is not None:
        there = score(other, split, streams)
        changed = [] if parameter_dtype == "float32" else [f"parameter_dtype: {parameter_dtype} -> float32"]
        changed += [] if spliced is None else [f"splice: {spliced.place} -> none"]
        apart = [*differences(run.values, other.values), *changed]
        result["against"] = {"workdir": str(against), "step": other.step, "seal": seal(against, other.step)}
        result["against"] |= {**_compared(task, scores, there), "differences": apart}
        if spliced is not None:
            result["splice"] = spliced.record(
                task.selection_metric,
                plain=there if other is whole else score(whole, split),
                spliced=scores,
                ablated=score(splicing.ablated(whole, split, spliced.site, spliced.layer), split),
            )
    if run.data_changes:
        result["data_changed"] = run.data_changes
    if other is not None and other.data_changes:
        result["against"]["data_changed"] = other.data_changes
    result |= {"throughput": scores.throughput, "seconds": seconds}
    result |= {"config": run.values, "versions": versions(), "hardware": hardware()}
    return result


def _compared(task: Any, here: Scores, there: Scores) -> dict[str, Any]:
    """Every metric of two evaluations of the same examples, and the verdict on the task's own and on the loss."""
    found, metric = compare(here, there), task.selection_metric
    # Bits per byte are the loss in other units.
    names = [metric] if metric == "bits_per_byte" else dict.fromkeys((metric, "loss"))
    better = {metric: task.higher_is_better}
    said = [verdict(name, found[name], better.get(name, False), len(here.digests)) for name in names]
    metrics = {
        name: {field: value if isinstance(value, str) else plain(value) for field, value in fields.items()}
        for name, fields in found.items()
    }
    return {"metrics": metrics, "verdicts": said}


def _refuse_beside_splice(**options: Any) -> None:
    """`--splice` is one question; a hypernetwork is asked it at its middle hyper-input."""
    for name, value in options.items():
        require(value in (None, "float32"), f"--{name}: not together with --splice; remove one of them")


def _protocol(streams: int | None, spliced: splicing.Splicing | None) -> str:
    if spliced is not None:
        return f"every example by itself, {spliced.place} spliced by {spliced.origin.name}"
    return "every example by itself" if streams is None else "one pass with carried state"


def quantized(run: Run, dtype: ParameterDtype) -> Run:
    """The run with its kernels in `dtype`. Raises UserError for a hypernetwork."""
    require(
        run.values.get("hypernetwork") is None,
        f"--parameter_dtype={dtype}: the parameters of this run are generated by a hypernetwork, in float32",
    )
    return dataclasses.replace(run, variables=quantize(run.variables, dtype))


def read_result(path: Path, workdir: Path) -> dict[str, Any] | None:
    """A result of a checkpoint in `workdir`; None, with a warning, for a result of another run, config or step, and
    None without a file. Raises UserError for a malformed file.
    """
    if not path.exists():
        return None
    try:
        found = files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again, or remove it") from error
    step = found.get("step")
    if type(step) is int and found.get("seal") and found["seal"] == seal(workdir, step):
        return found
    logging.warning("%s is ignored: it is not a result of a checkpoint in %s; evaluate again", path, workdir)
    return None


def result_file(result: dict[str, Any]) -> str:
    """The file name of an evaluation in its work directory."""
    if "splice" in result:
        return f"splice_{result['split']}_{result['step']}_{Path(result['splice']['workdir']).stem}.json"
    protocol = f"one_pass_{result['streams']}" if "streams" in result else "evaluation"
    at = "" if result["at"] is None else "_at_" + "_".join(f"{z:g}" for z in result["at"])
    dtype = f"_{result['parameter_dtype']}" if "parameter_dtype" in result else ""
    return f"{protocol}_{result['split']}_{result['step']}{at}{dtype}.json"


def show(result: dict[str, Any]) -> None:
    """Prints an evaluation as tables: metrics, per-class metrics and confusions if any, the comparison if any."""
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
    for name, value in result["baseline"].items():
        table.add_row(f"{name}: {result['baseline_name']}", _number(value))
    for name, rate in result["throughput"].items():
        table.add_row(name.replace("_per_second", " per second"), "-" if rate is None else f"{rate:,.1f}")
    console.print(table)
    if "confusion" in result:
        classes = result["per_class"]["name"]
        each = Table("class", title="per class: precision, recall, examples", title_justify="left")
        columns = ("precision", "recall", "support")
        for name in columns:
            each.add_column(name, justify="right")
        for name, *row in zip(classes, *(result["per_class"][column] for column in columns), strict=True):
            each.add_row(name, *map(_number, row[:2]), f"{row[2]:,.0f}")
        console.print(each)
        matrix = Table(
            "class", *classes, title="confusion matrix: answers in percent of each true class", title_justify="left"
        )
        for name, row in zip(classes, result["confusion"], strict=True):
            matrix.add_row(name, *("-" if share is None else f"{100 * share:.0f}" for share in row))
        console.print(matrix)
    if "splice" in result:
        console.print(_splice_table(result["splice"]))
    if "against" in result:
        apart = "; ".join(result["against"]["differences"]) or "identical configs, apart from the seed"
        for line in [*result["against"]["verdicts"], f"here -> there: {apart}"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _splice_table(splice: dict[str, Any]) -> Table:
    names = list(splice["metrics"]["plain"])
    place = f"{splice['site']} of layer {splice['layer']}"
    table = Table(place, title=f"what splicing {splice['workdir']} costs", title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for how, row in zip(("as it is", "spliced", "its mean"), ("plain", "spliced", "ablated"), strict=True):
        table.add_row(how, *(_number(splice["metrics"][row][name]) for name in names))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
