"""Write the pages of results from the files beside them:  python -m experiments.pages.results [--docs=docs]

Every docs/results/NAME.json of `experiments.pages.curves` is a section: a table of its runs, its picture NAME.png, and
the remarks in NAME.md. docs/results/published.json has the best published numbers. Recipes without a section are "not
run".
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common import cli
from experiments.common.errors import UserError
from experiments.pages import hypernetworks, performance

_DOCS = flags.DEFINE_string("docs", "docs", "The directory of results.md and results/.")

PUBLISHED = "published.json"
HEAD = """# Results

Written by `python -m experiments.pages.results` from the files in `docs/results/`: each holds the configs, versions,
hardware and curves of its runs. A test metric is that of the best checkpoint by validation, tested once.

"""


def main() -> None:
    docs = Path(_DOCS.value or "docs")
    (docs / "results.md").write_text(page(docs / "results"))
    print(f"written {docs / 'results.md'}")
    if (docs / "performance").is_dir():
        (docs / "performance.md").write_text(performance.page(docs / "performance"))
        print(f"written {docs / 'performance.md'}")
    if (docs / "hypernetworks").is_dir():
        (docs / "hypernetworks.md").write_text(hypernetworks.page(docs / "hypernetworks"))
        print(f"written {docs / 'hypernetworks.md'}")


def page(directory: Path) -> str:
    """The whole page as Markdown. Raises UserError for a file that is no result."""
    published = _read(directory / PUBLISHED)
    sections = [section(path) for path in sorted(directory.glob("*.json")) if path.name != PUBLISHED]
    return "\n".join([HEAD, *sections, recipes(published)])


def section(path: Path) -> str:
    """One file: what was run, a row for every arm, the picture, the remarks."""
    runs = _read(path)
    try:
        name = path.stem
        lines = [f"## {name.replace('_', ' ')}", ""]
        commands = [run["command"] for run in runs.values() if run.get("command")]
        lines += [f"    {command}" for command in commands] + [""] * bool(commands)
        lines += ["| arm | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
        lines += [f"| {label} | " + " | ".join(row(run)) + " |" for label, run in runs.items()]
        first = next(iter(runs.values()))
        versions = ", ".join(f"{package} {first['versions'][package]}" for package in ("python", "jax", "flax"))
        lines += ["", f"{first['hardware']}; {versions}; [{path.name}](results/{path.name})."]
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path} is no file of experiments.pages.curves: {error!r}") from error
    if (path.parent / f"{name}.png").exists():
        lines += ["", f"![curves of {name}](results/{name}.png)"]
    remarks = path.parent / f"{name}.md"
    if remarks.exists():
        lines += ["", remarks.read_text().strip()]
    return "\n".join(lines) + "\n"


ARMS = ("paper", "credit_router", "always", "no_attention")
COLUMNS = ("seeds", "steps", "batch size", "minutes", "metric", "test", "baseline", "activation rate by layer")


def row(run: dict[str, Any]) -> list[str]:
    """The cells of an arm, in the order of COLUMNS."""
    config, tests = run["config"], run["test"]
    train, test = config["train"], tests[-1] if tests else {}
    selection_metric = test.get("selection_metric", "accuracy")
    seeds = run.get("seeds", [config["seed"]])
    score, rates = "not run", test.get("activation_rate") or []
    if selection_metric in test:
        score = f"{test[selection_metric]:.4f}"
    if "metrics" in run:
        metric = run["metrics"][selection_metric]
        rates = [sum(layer) / len(layer) for layer in zip(*filter(None, run["activation_rate"]), strict=True)]
        if metric["standard_error"] is not None:
            least, most = min(metric["values"]), max(metric["values"])
            score = f"{metric['mean']:.4f} ± {metric['standard_error']:.4f} ({least:.3f} to {most:.3f})"
    return [
        str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
        f"{train['steps']:,}",
        str(train["batch_size"]),
        f"{run['training_seconds'] / 60:.1f}",
        {"bits_per_byte": "bits per byte"}.get(selection_metric, selection_metric),
        score,
        f"{test['baseline'][selection_metric]:.4f}" if selection_metric in test.get("baseline", {}) else "",
        " ".join(f"{rate:.2f}" for rate in rates) or "-",
    ]


def recipes(published: dict[str, Any]) -> str:
    """The recipes at their full length: the best published numbers, and those measured here where there are any."""
    try:
        return _recipes(published)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{PUBLISHED} is not what it should be: {error!r}") from error


def _recipes(published: dict[str, Any]) -> str:
    lines = ["## The full recipes", "", published["note"], ""]
    lines += ["| recipe | parameters | here: SeqBoat | credit router | always active | no attention | best published |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, entry in published["recipes"].items():
        ours = [
            entry.get("ours", {}).get(arm, "not run") for arm in ("paper", "credit_router", "always", "no_attention")
        ]
        lines += [f"| `{name}` | {entry['parameters']:,} | " + " | ".join(ours) + f" | {entry['field']} |"]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


if __name__ == "__main__":
    cli.run(main)
