"""docs/hypernetworks.md and its pictures, from docs/_data/hypernetworks/ (python -m experiments.pages.results).

intro.md, a section for every study whose NAME.json is there with the remarks of NAME.md, and end.md.
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.common.errors import UserError
from experiments.common.pictures import save_picture

LEVEL = "0.2"


def page(directory: Path) -> str:
    """The whole page as Markdown; draws the pictures. Raises UserError for a file that is not a study."""
    parts = [_read(directory / "intro.md")]
    for name, section in SECTIONS.items():
        path = directory / f"{name}.json"
        if not path.exists():
            continue
        try:
            result = json.loads(path.read_text())
            parts.append(section(name, result, directory) + _foot(name, result) + _read(directory / f"{name}.md"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a file of experiments.study ({error!r}): run it again, or remove it"
            ) from error
    return "\n".join([*parts, _read(directory / "end.md")])


def _read(path: Path) -> str:
    return path.read_text() + "\n" if path.exists() else ""


def _foot(name: str, result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {result['versions'][package]}" for package in ("python", "jax", "flax"))
    file = f"[{name}.json](_data/hypernetworks/{name}.json)"
    return f"\n    {result['command']}\n\n{result['hardware']}; {versions}; {file}.\n\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def arms(name: str, result: dict[str, Any], directory: Path) -> str:
    """One row for each optimiser and arm."""
    rows = []
    for arm in result["arms"].values():
        reached = [step for step in arm["reached"][LEVEL] if step is not None]
        middle = f"{sorted(reached)[len(reached) // 2]}" if len(reached) == len(arm["reached"][LEVEL]) else "-"
        tests = [value for value in arm["test_accuracy"] if value is not None]
        rows.append(
            [
                arm["optimizer"],
                arm["arm"].replace("_", " "),
                f"{arm['rate']:g}",
                "{} [{}, {}]".format(*map(_loss, arm["loss"])),
                f"{fmean(tests):.3f}" if len(tests) == len(arm["test_accuracy"]) else "-",
                f"{middle} ({len(reached)} of {len(arm['reached'][LEVEL])})",
                f"{arm['rates_within_1.5']} of {len(arm['rates'])}",
                f"{arm['diverged']} of {len(arm['rates']) * len(arm['test_accuracy'])}",
                " → ".join(f"{_median([curve[at] for curve in arm['gradient_variation']]):.2f}" for at in (0, -1)),
            ]
        )
    head = ["optimiser", "arm", "rate", "validation loss: median [least, most]", "test accuracy"]
    head += [f"steps to {LEVEL}", "rates within 1.5x", "failed runs", "gradient variation: start → end"]
    _draw_arms(result, directory / f"{name}.png")
    title = {"rotation": "Digits at every angle", "noise": "A Bayesian hypernetwork: eight random numbers"}[name]
    return f"## {title}\n\n{_table(head, rows)}\n![validation loss of every arm](_data/hypernetworks/{name}.png)\n"


def pareto(name: str, result: dict[str, Any], directory: Path) -> str:
    """Accuracy and activation rate at each penalty: of the hypernetworks, and of models of one penalty."""
    largest = result["config"]["mip"]["train"]["activation_penalty"]
    rows = []
    for arm in ("mip", "separate"):
        own = [run for run in result["runs"] if run["arm"] == arm]
        for at in sorted({run["penalty"] for run in own}):
            here = [run for run in own if run["penalty"] == at]
            rates = [fmean(run["activation_rate"]) for run in here]
            rows.append(
                [
                    {"mip": "one hypernetwork", "separate": "one model per penalty"}[arm],
                    f"{at:g}",
                    _values([run["accuracy"] for run in here]),
                    _values(rates),
                    f"{fmean(run['loss'] for run in here):.4f}",
                ]
            )
    _draw_pareto(result, directory / f"{name}.png")
    title = {"pareto_copy": "selective copying", "pareto_listops": "short ListOps"}[name]
    return (
        f"## One run, every activation penalty: {title}\n\nPenalty: lambda x {largest:g}. Seeds "
        f"{', '.join(map(str, sorted({run['seed'] for run in result['runs']})))}. Test split, last step.\n\n"
        + _table(["", "lambda", "accuracy", "activation rate, mean of layers", "loss"], rows)
        + f"\n![accuracy against activation rate](_data/hypernetworks/{name}.png)\n"
    )


def continual(name: str, result: dict[str, Any], directory: Path) -> str:
    """Accuracy after the last of five tasks, and what was forgotten."""
    rows = []
    for label, arm in result["arms"].items():
        columns = [_values(arm[column]) for column in ("learned", "last", "forgetting")]
        benchmark, generator, regulariser = label.split()
        rows.append([benchmark, {"chunked": "MLP", "recurrent": "LSTM"}[generator], regulariser, *columns])
    head = ["tasks", "generator", "regulariser", "accuracy when learned", "after the last task", "forgetting"]
    return f"## Five tasks, one after another\n\n{_table(head, rows)}\n"


SECTIONS = {
    "pareto_copy": pareto,
    "pareto_listops": pareto,
    "rotation": arms,
    "noise": arms,
    "continual": continual,
}


def _values(values: list[float]) -> str:
    """Mean and standard error of the mean."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def _loss(value: float | None) -> str:
    return "failed" if value is None else f"{value:.3f}"


def _median(values: list[float | None]) -> float:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else float("nan")


def _draw_arms(result: dict[str, Any], path: Path) -> None:
    pyplot = _pyplot()
    optimizers = list(dict.fromkeys(arm["optimizer"] for arm in result["arms"].values()))
    figure, axes = pyplot.subplots(
        1, len(optimizers), figsize=(9, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, optimizer in zip(axes[0], optimizers, strict=True):
        own = [arm for arm in result["arms"].values() if arm["optimizer"] == optimizer]
        for color, arm in enumerate(own):
            panel.plot(arm["steps"], arm["curve"], label=arm["arm"].replace("_", " "), color=f"C{color}")
        panel.set(title=optimizer, xlabel="steps", yscale="log")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss, median of seeds")
    axes[0][-1].legend(fontsize=7)
    save_picture(figure, path)
    pyplot.close(figure)


def _draw_pareto(result: dict[str, Any], path: Path) -> None:
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for arm, marker, label in (("mip", "o-", "one hypernetwork"), ("separate", "s", "one model per penalty")):
        own = [run for run in result["runs"] if run["arm"] == arm]
        for color, seed in enumerate(sorted({run["seed"] for run in own})):
            points = sorted((fmean(run["activation_rate"]), run["accuracy"]) for run in own if run["seed"] == seed)
            panel.plot(
                *zip(*points, strict=True), marker, color=f"C{color}", label=f"{label}, seed {seed}", markersize=4
            )
    panel.set(xlabel="activation rate, mean of layers", ylabel="test accuracy")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    save_picture(figure, path)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
