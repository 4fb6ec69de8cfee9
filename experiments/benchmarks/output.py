"""Benchmark rows as text, as a JSON file with full provenance, and as a figure."""

import os
import re
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from experiments.common.files import write_json
from experiments.common.provenance import command, hardware, versions

Row = dict[str, Any]


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):  # quartiles
        return " to ".join(map(text, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def line(row: Row) -> str:
    return "  ".join(f"{name} {text(value)}" for name, value in row.items() if value is not None)


def table(rows: list[Row]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    found = Table(*columns)
    for row in rows:
        found.add_row(*(text(row.get(name)) for name in columns))
    return found


def markdown(rows: list[Row]) -> list[str]:
    """The lines of a table with every column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(text(row.get(name)) for name in columns) + " |" for row in rows]


def write(out: Path, suite: str, rows: list[Row], *, keep_memory: bool) -> None:
    """Writes OUT.json."""
    typed = re.sub(r"(--published=)\S*/", r"\1", command())
    found = {"suite": suite, "command": typed, "hardware": hardware(), "device_kind": jax.devices()[0].device_kind}
    about = {"keep_memory": keep_memory, "xla_flags": os.environ.get("XLA_FLAGS", ""), "versions": versions("torch")}
    write_json(Path(f"{out}.json"), {**found, **about, "rows": rows})


def draw(rows: list[Row], path: Path) -> None:
    """Milliseconds over the activation rate, one panel per case; contenders without a rate are horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3), squeeze=False, layout="constrained")
    for panel, name in zip(axes[0], names, strict=True):
        mine = [row for row in rows if row["case"] == name]
        for index, who in enumerate(dict.fromkeys(row["contender"] for row in mine)):
            points = [(row["rate"], row["median_ms"]) for row in mine if row["contender"] == who]
            if points[0][0] is None:
                panel.axhline(points[0][1], label=who, color=f"C{index}", linestyle="--")
            else:
                panel.plot(*zip(*sorted(points), strict=True), marker="o", label=who, color=f"C{index}")
        panel.set(title=name, xlabel="activation rate", ylabel="ms, forward and backward", ylim=(0, None))
    axes[0][0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
