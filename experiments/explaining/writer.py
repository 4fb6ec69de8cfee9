"""One page on why a trained run attends: load it and its dictionaries, measure, write the page and its numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, write_json, write_text
from experiments.common.provenance import command, hardware, versions
from experiments.training.restore import beside, bound, load, seal

PAGE = "why.html"


def write_explanation(
    workdir: Path,
    paths: Sequence[Path],
    split: str = "test",
    step: int | None = None,
    examples: int = 128,
    element: int | None = None,
    data_dir: str | None = None,
    out: Path | None = None,
    against: Path | None = None,
    against_paths: Sequence[Path] = (),
    codebook: Path | None = None,
) -> tuple[Path, Path]:
    """Measures `examples` of a split at a step of a run, the best one by default, with the dictionaries at `paths`, and
    writes the page to `out` and the numbers to a JSON file of that name; returns both paths.

    `out` is `why.html` in the work directory, or next to the exported file, by default. `element`: whose decision to
    show; `data_dir`: as in `load`; `against`: another run to compare with, with its dictionaries at `against_paths`,
    and then `paths` may be empty; `codebook`: a run of the same model with codebooks at m, of which the page shows the
    codes by activation. Raises UserError as `dictionaries.read`, `against.read_other` and `codes.read` do.
    """
    # Imported here: matplotlib takes a second, which --help does without.
    from experiments.explaining import against as others
    from experiments.explaining import codes
    from experiments.explaining.dictionaries import read
    from experiments.explaining.measure import Looks, explain
    from experiments.explaining.page import page
    from experiments.reports.measure import sequences, spread

    path = out or beside(workdir, PAGE)
    run = bound(load(workdir, step, data_dir))
    refuse_unwritable(path.parent)
    given = read(run, paths, data_dir) if paths or against is None else ()
    other = others.read_other(run, against, against_paths, data_dir)
    quantized = None if codebook is None else codes.read(run, codebook, data_dir)
    chosen, total = spread(run.task.evaluation_batches(split), examples)
    if not chosen:
        raise UserError(f"the {split} split is empty: there is nothing to explain")
    looks = Looks(run, list(chosen.values()))
    rows = [sequence for example in chosen.values() for sequence in sequences(example)]
    explained = [explain(looks, dictionary, split, rows, element) for dictionary in given]
    compared, shown = others.explain_other(run, given, other, list(chosen.values())) if other else (None, None)
    why: dict[str, Any] = {
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
        "run": {"workdir": str(workdir), "step": run.step, "seal": seal(workdir, run.step)},
        "split": split,
        "examples": len(chosen),
        "of": total,
        "model_layers": looks.layers,
        "layers": [layer.values for layer in explained],
        "against": compared,
        "codes": None,
    }
    if quantized is not None:
        source = {"workdir": str(codebook), "step": quantized.step}
        why["codes"] = {**source, "layers": codes.by_activation(quantized, looks.examples, rows)}
    numbers = path.with_suffix(".json")
    text = page(why, explained, run, rows, shown)
    write_json(numbers, why)
    write_text(path, text)
    return path, numbers
