"""A benchmark's rows as text, as a JSON file that names everything they depend on, as a picture, and as a page.

The page is docs/performance.md: docs/performance/intro.md, a section for every NAME.json there with the remarks of
NAME.md, and tried.md. `python -m experiments.pages.results` writes it.
"""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.common.errors import UserError
from experiments.evaluation.evaluator import write_json
from experiments.training.loop import command, hardware, versions

Row = dict[str, Any]


def text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def line(row: Row) -> str:
    return "  ".join(f"{name} {text(value)}" for name, value in row.items() if value is not None)


def table(rows: list[Row]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    found = Table(*columns)
    for row in rows:
        found.add_row(*(text(row.get(name)) for name in columns))
    return found


def write(out: Path, suite: str, rows: list[Row], *, keep_memory: bool) -> list[Path]:
    """OUT.json, and OUT.png if there is something to draw."""
    out.parent.mkdir(parents=True, exist_ok=True)
    typed = re.sub(r"(--published=)\S*/", r"\1", command())
    found = {"suite": suite, "command": typed, "hardware": hardware(), "keep_memory": keep_memory}
    libraries = {name: importlib.metadata.version(name) for name in ("torch",) if _installed(name)}
    write_json(Path(f"{out}.json"), {**found, "versions": versions() | libraries, "rows": rows})
    written = [Path(f"{out}.json")]
    if suite == "layers":
        draw(rows, Path(f"{out}.png"))
        written.append(Path(f"{out}.png"))
    return written


def draw(rows: list[Row], path: Path) -> None:
    """Milliseconds against the activation rate, one panel a case; what has no rate is a level line."""
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


def page(directory: Path) -> str:
    """The whole page as Markdown. Raises UserError for a file that is no benchmark's."""
    files = sorted(directory.glob("*.json"))
    return "\n".join([_remarks(directory / "intro.md"), *map(section, files), _remarks(directory / "tried.md")])


def section(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        rows = found["rows"]
        table = _pivot(rows) if found["suite"] == "layers" else _plain(rows)
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines = [f"## {path.stem.replace('_', ' ')}", "", f"    {found['command']}", "", *table, ""]
        lines += [f"{found['hardware']}; {versions}; [{path.name}](performance/{path.name})."]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of experiments.benchmark: {error!r}") from error
    if path.with_suffix(".png").exists():
        lines += ["", f"![{path.stem}](performance/{path.stem}.png)"]
    return "\n".join([*lines, "", _remarks(path.with_suffix(".md"))])


def _remarks(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _pivot(rows: list[Row]) -> list[str]:
    """A line a case: at every rate the published layer's milliseconds, ours, and the ratio; then the other forms."""
    rates = sorted({row["rate"] for row in rows if row["rate"] is not None})
    forms = list(dict.fromkeys(row["contender"] for row in rows if row["rate"] is None))
    lines = ["| layer | " + " | ".join([*(f"rate {rate:g}" for rate in rates), *forms]) + " |"]
    lines += ["|" + "---|" * (1 + len(rates) + len(forms))]
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {(row["contender"], row["rate"]): row for row in rows if row["case"] == case}
        cells = []
        for rate in rates:
            ours = of["sparse", rate]
            theirs = f"{of['published', rate]['median_ms']:.0f} → " if ("published", rate) in of else ""
            speedup = f" (**{ours['speedup']:.1f}x**)" if "speedup" in ours else ""
            cells.append(f"{theirs}{ours['median_ms']:.0f}{speedup}")
        cells += [f"{of[form, None]['median_ms']:.0f}" if (form, None) in of else "" for form in forms]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return [*lines, "", "Milliseconds, published → ours."]


def _plain(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(text(row.get(name)) for name in columns) + " |" for row in rows]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
