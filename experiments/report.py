"""Show where a trained run's attention goes:  python -m experiments.report --workdir=runs/x [--examples=128]

Writes WORKDIR/report.html, one file that opens in any browser and loads nothing else.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import cli
from experiments.errors import UserError
from experiments.evaluation import result_file, write_text
from experiments.restore import bound, load, middle

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's work directory; nothing else is needed.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint: the best one by default.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "test", "The split of the task to look at.")
_EXAMPLES = flags.DEFINE_integer("examples", 128, "How many examples of the split to look at.", lower_bound=1)
_ELEMENT = flags.DEFINE_integer("element", None, "The element of the first example whose decision is taken apart.")
_AT = cli.define_hyper_input()
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    cli.use_compilation_cache()
    path = write_report(
        Path(_WORKDIR.value),
        _SPLIT.value or "test",
        _STEP.value,
        _EXAMPLES.value or 128,
        _ELEMENT.value,
        _DATA_DIR.value,
        cli.hyper_input(_AT),
    )
    print(f"written {path}")


def write_report(
    workdir: Path,
    split: str = "test",
    step: int | None = None,
    examples: int = 128,
    element: int | None = None,
    data_dir: str | None = None,
    at: tuple[float, ...] | None = None,
) -> Path:
    """Looks at a step of a run, the best one by default, and writes `report.html` into its work directory."""
    from experiments.reports.history import read_history  # matplotlib takes a second to import
    from experiments.reports.measure import measure
    from experiments.reports.page import Content, page

    loaded = load(workdir, step, data_dir, at)
    run = bound(loaded)
    if not hasattr(run.model.config, "encoder"):
        raise UserError(f"the run in {workdir} is of a {type(run.model).__name__}: it has no attention to report")
    at = None if loaded.experiment.config.hyper is None else tuple(middle(loaded.task).tolist())
    evaluated = workdir / result_file({"split": split, "step": run.step, "at": at})
    evaluation = _read_evaluation(evaluated)
    measured = measure(run, split, examples, element)
    content = Content(
        workdir=workdir.absolute(),
        split=split,
        at=at,
        step=run.step,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"])),
        task=run.task,
        layer=run.model.config.encoder.layer,
        measured=measured,
        history=read_history(workdir, measured.names),
        evaluation=evaluation,
        trivial=evaluation["trivial"] if evaluation and "trivial" in evaluation else run.task.trivial(split),
        meta=dict(loaded.meta),
    )
    try:
        text = page(content)
    except Exception as error:
        # What cannot be written without the evaluation either is not its fault.
        page(dataclasses.replace(content, evaluation=None, trivial=run.task.trivial(split)))
        raise UserError(f"{evaluated} is no evaluation ({error!r}): evaluate again, or remove it") from error
    path = workdir / "report.html"
    write_text(path, text)
    return path


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    """What experiments.evaluate wrote of this step, if it did."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again, or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no evaluation: evaluate again, or remove it")
    return found


if __name__ == "__main__":
    cli.run(main)
