"""Show where a trained run's attention goes:  python -m experiments.report --workdir=runs/x [--examples=128]

Writes WORKDIR/report.html, or --out, one file that opens in any browser and loads nothing else.
"""

import dataclasses
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, user_path, write_text
from experiments.evaluation.evaluator import read_result, result_file
from experiments.training.restore import bound, load, middle

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's work directory; nothing else is needed.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint: the best one by default.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "test", "The split of the task to look at.")
_EXAMPLES = flags.DEFINE_integer("examples", 128, "How many examples of the split to look at.", lower_bound=1)
_ELEMENT = flags.DEFINE_integer("element", None, "The element of the first example whose decision is taken apart.")
_OUT = flags.DEFINE_string("out", None, "The page to write, instead of report.html in the work directory.")
_AT = cli.define_hyper_input()
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    runtime.use_compilation_cache()
    path = write_report(
        user_path(_WORKDIR.value, "--workdir"),
        _SPLIT.value or "test",
        _STEP.value,
        _EXAMPLES.value or 128,
        _ELEMENT.value,
        _DATA_DIR.value,
        cli.hyper_input(_AT),
        None if _OUT.value is None else user_path(_OUT.value, "--out"),
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
    out: Path | None = None,
) -> Path:
    """Looks at a step of a run, the best one by default, and writes `report.html` into its work directory, or `out`."""
    from experiments.reports.history import read_history  # matplotlib takes a second to import
    from experiments.reports.measure import measure
    from experiments.reports.page import Content, page

    path = out or workdir / "report.html"
    loaded = load(workdir, step, data_dir, at)
    refuse_unwritable(path.parent)
    run = bound(loaded)
    if not hasattr(run.model.config, "encoder"):
        raise UserError(f"the run in {workdir} is of a {type(run.model).__name__}: it has no attention to report")
    at = None if loaded.experiment.config.hyper is None else tuple(middle(loaded.task).tolist())
    evaluated = workdir / result_file({"split": split, "step": run.step, "at": at})
    evaluation = read_result(evaluated, workdir)
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
    write_text(path, text)
    return path


if __name__ == "__main__":
    cli.run(main)
