"""A table's file: of every run its config, hardware, versions, curve and test result; and its picture."""

import json
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.common import terminal
from experiments.common.errors import UserError
from experiments.common.files import write_json
from experiments.common.pictures import save_picture
from experiments.evaluation.evaluator import read_result
from experiments.evaluation.seeds import SUMMARY_FILE
from experiments.training.checkpoints import Checkpoints
from experiments.training.metrics import METRICS_FILE, MetricsFile
from experiments.training.restore import CHECKPOINTS


def write(runs: dict[str, Any], out: Path) -> None:
    """Writes OUT.json and OUT.png. Raises UserError for runs that have no metric in common."""
    headlines = {test.get("selection_metric", "accuracy") for run in runs.values() for test in run["test"]}
    if len(headlines) > 1:
        raise UserError(f"these runs have no metric in common: {' and '.join(sorted(headlines))}")
    write_json(Path(f"{out}.json"), runs)
    draw(runs, Path(f"{out}.png"))


def read_run(workdir: Path) -> dict[str, Any]:
    """Everything a result in the docs must name, from a work directory; of several seeds the curve of the first."""
    if (workdir / SUMMARY_FILE).exists():
        summary = json.loads((workdir / SUMMARY_FILE).read_text())
        runs = [read_run(workdir / f"seed_{seed}") for seed in summary["seeds"]]
        seconds = sum(run["training_seconds"] for run in runs) / len(runs)
        chosen = {name: summary[name] for name in ("seeds", "metrics", "activation_rate")}
        return {**runs[0], "training_seconds": seconds, **chosen}
    records = list(MetricsFile(workdir / METRICS_FILE).records())
    if not records:
        raise UserError(f"{workdir} holds no {METRICS_FILE}: was this run ever started?")
    with Checkpoints(workdir / CHECKPOINTS, read_only=True) as checkpoints:
        meta = checkpoints.read_meta()
    found = [read_result(path, workdir) for path in workdir.glob("evaluation_test_*.json")]
    tests = [test for test in found if test is not None]
    # Steps that somebody asked for are looks at the test split, not results: those are of the best step.
    tests = sorted((test for test in tests if test.get("best", True)), key=lambda test: test["step"])[-1:]
    keep = {"step", "loss", "accuracy", "bits_per_byte", "activation_rate", "confidence"}
    keep |= {test["selection_metric"] for test in tests if "selection_metric" in test}
    curves = {
        kind: [{name: record[name] for name in record if name in keep} for record in records if record["kind"] == kind]
        for kind in ("train", "evaluation")
    }
    seconds = sum(record.get("seconds", 0.0) for record in records if record["kind"] == "train")
    facts = {name: meta.get(name) for name in ("config", "versions", "hardware", "command")}
    if isinstance(facts["config"], dict):
        facts["config"].pop("data_dir", None)  # a place on one machine, no part of the result
    for test in tests:
        test.pop("seal", None)
        test.pop("config", None)
        test.pop("versions", None)
        test.pop("against", None)  # a look at another run
    return {**facts, "training_seconds": seconds, "test": tests, "curve": curves}


def show(runs: dict[str, Any]) -> None:
    """Prints a row for every run of several seeds: the selection metric on the test split and the activation rates."""
    first = next(iter(runs.values()))["test"][-1]
    metric = first["selection_metric"]
    table = Table("arm", title=f"test {metric.replace('_', ' ')}, {first['baseline_name']}: {_baseline(first)}")
    for name in ("seeds", "mean", "lowest", "highest", "activation rate by layer", "minutes"):
        table.add_column(name, justify="right")
    for label, run in runs.items():
        values = [value for value in run["metrics"][metric]["values"] if value is not None]
        rates = [statistics.fmean(layer) for layer in zip(*filter(None, run["activation_rate"]), strict=True)]
        numbers = [f"{pick(values):.4f}" if values else "-" for pick in (statistics.fmean, min, max)]
        text = " ".join(f"{rate:.2f}" for rate in rates) or "-"
        table.add_row(label, str(len(run["seeds"])), *numbers, text, f"{run['training_seconds'] / 60:.1f}")
    terminal.console().print(table)


def _baseline(test: dict[str, Any]) -> str:
    value = test["baseline"].get(test["selection_metric"])
    return "-" if value is None else f"{value:.4f}"


def draw(runs: dict[str, Any], path: Path) -> None:
    """The selection metric in training and validation, and the activation rate of every layer, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    selection_metric = next(
        (test["selection_metric"] for run in runs.values() for test in run["test"] if "selection_metric" in test),
        "accuracy",
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for number, (label, run) in enumerate(runs.items()):
        color = f"C{number}"
        train, evaluation = run["curve"]["train"], run["curve"]["evaluation"]
        left.plot(*curve(train, selection_metric), color=color, alpha=0.4, linewidth=1)
        left.plot(*curve(evaluation, selection_metric), color=color, marker="o", markersize=3, label=label)
        rates = [record for record in train if record.get("activation_rate")]
        for layer in range(len(rates[0]["activation_rate"]) if rates else 0):
            steps = [record["step"] for record in rates]
            values = [record["activation_rate"][layer] for record in rates]
            style = ("-", "--", ":", "-.")[layer % 4]
            right.plot(steps, values, style, color=color, linewidth=1, label=f"{label}, layer {layer}")
    left.set(
        xlabel="step",
        ylabel="bits per byte" if selection_metric == "bits_per_byte" else selection_metric,
        title="training (thin) and validation",
    )
    right.set(
        xlabel="step", ylabel="activation rate", ylim=(-0.02, 1.02), title="share of tokens that activate attention"
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:  # an MLP has no activation rates
            axis.legend(fontsize=7)
    save_picture(figure, path)


def curve(records: list[dict], name: str) -> tuple[list, list]:
    """Steps and values of a metric, where there are some."""
    known = [record for record in records if name in record]
    return [record["step"] for record in known], [record[name] for record in known]
