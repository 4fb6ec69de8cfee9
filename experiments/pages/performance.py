"""docs/performance.md: intro.md of docs/performance, a section for every NAME.json and its NAME.md, one for every file
of accelerators/, and tried.md."""

import json
from pathlib import Path

from experiments.benchmarks.output import Row, markdown, text
from experiments.common.errors import UserError
from experiments.pages import accelerator
from experiments.pages.tables import for_readers


def page(directory: Path) -> str:
    """The whole page as Markdown. Raises UserError for a file that is not a benchmark result."""
    sections = [*map(section, sorted(directory.glob("*.json"))), accelerators(directory)]
    return "\n".join([_remarks(directory / "intro.md"), *sections, _remarks(directory / "tried.md")])


def accelerators(directory: Path) -> str:
    """What launch/accelerator.sh found on each device, or that it was not run."""
    found = [accelerator.section(path) for path in sorted((directory / "accelerators").glob("*.json"))]
    remarks = _remarks(directory / "accelerators.md")
    return "\n".join(["## Measured on accelerators", "", *(found or [accelerator.NOT_RUN, ""]), remarks])


def section(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        rows = found["rows"]
        table = _pivot(rows) if found["suite"] == "layers" else markdown(rows)
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines = [f"## {path.stem.replace('_', ' ')}", "", f"    {for_readers(found['command'])}", "", *table, ""]
        lines += [f"{found['hardware']}; {versions}; [{path.name}](_data/performance/{path.name})."]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of experiments.benchmark: {error!r}") from error
    if path.with_suffix(".png").exists():
        lines += ["", f"![{path.stem}](_data/performance/{path.stem}.png)"]
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
            speedup = f" (**{ours['speedup']:.1f}x**{_spread(ours)})" if "speedup" in ours else ""
            cells.append(f"{theirs}{ours['median_ms']:.0f}{speedup}")
        cells += [f"{of[form, None]['median_ms']:.0f}" if (form, None) in of else "" for form in forms]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "Milliseconds, published → ours.",
    ]


def _spread(row: Row) -> str:
    """The quartiles, where the file has them."""
    return "; " + text(row["speedup_quartiles"]) if "speedup_quartiles" in row else ""
