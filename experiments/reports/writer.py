"""One page on where a trained run's attention goes: load the run, measure it, write the page."""

import dataclasses
from pathlib import Path

from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, write_text
from experiments.evaluation.evaluator import read_result, result_file
from experiments.training.models import encodes_inputs
from experiments.training.restore import beside, bound, load, middle
from seqboat.layers.config import LayerConfig


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
    """Measures `examples` of a split at a step of a run, the best one by default, and writes the page to `out`.

    `out` is `report.html` in the work directory, or next to the exported file, by default, and returned. `element`:
    whose decision to show; `data_dir`, `at`: as in `load`. Raises UserError for a run without attention, and for a
    damaged evaluation file.
    """
    # Imported here: matplotlib takes a second, which --help does without.
    from experiments.reports.cases import classified_like
    from experiments.reports.history import read_history
    from experiments.reports.measure import measure
    from experiments.reports.page import Content, page

    path = out or beside(workdir, "report.html")
    loaded = load(workdir, step, data_dir, at)
    refuse_unwritable(path.parent)
    run = bound(loaded)
    if not encodes_inputs(run.model):
        raise UserError(f"the run in {workdir} holds a {type(run.model).__name__}, which has no attention to report")
    if not isinstance(run.model.config.encoder.layer, LayerConfig):
        block = loaded.values["model"]["block"]
        raise UserError(f"the run in {workdir} has config.model.block={block!r}: reports show SeqBoat layers alone")
    at = None if loaded.values.get("hypernetwork") is None else tuple(middle(loaded.task).tolist())
    evaluated = beside(workdir, result_file({"split": split, "step": run.step, "at": at}))
    evaluation = read_result(evaluated, workdir)
    measured = measure(run, split, examples, element)
    content = Content(
        workdir=workdir.absolute(),
        split=split,
        at=at,
        step=run.step,
        parameters=run.parameters,
        task=run.task,
        layer=run.model.config.encoder.layer,
        measured=measured,
        history=read_history(workdir, measured.names),
        evaluation=evaluation,
        baseline=evaluation["baseline"] if evaluation and "baseline" in evaluation else run.task.baseline(split),
        meta=dict(loaded.meta),
        explained=beside(workdir, "why.html").exists(),
        cases=classified_like(run, measured),
    )
    try:
        text = page(content)
    except Exception as error:
        # Raises if the evaluation is not to blame.
        page(dataclasses.replace(content, evaluation=None, baseline=run.task.baseline(split)))
        raise UserError(f"{evaluated} is not an evaluation ({error!r}): evaluate again, or remove it") from error
    write_text(path, text)
    return path
