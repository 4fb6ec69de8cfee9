"""One page on why a trained run attends: load it and its dictionaries, measure, write the page and its numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from experiments.common.errors import UserError
from experiments.common.files import json_line, refuse_unwritable, write_json, write_text
from experiments.common.provenance import command, hardware, versions
from experiments.training.restore import beside, bound, load, seal

PAGE, LINES, ANSWERS = "why.html", "explanations.jsonl", "_answers.jsonl"


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
    explainer: str = "predicates",
    explainer_model: str | None = None,
) -> tuple[Path, Path, Path]:
    """Measures `examples` of a split at a step of a run, the best one by default, with the dictionaries at `paths`, and
    writes the page to `out`, the numbers to a JSON file of that name, and a line for every feature shown, with its
    explanation and scores, to LINES beside it or, with `out`, to a .jsonl file of its name; returns the three paths.
    What a language model answers is kept in a file beside that, and not asked again.

    `out` is `why.html` in the work directory, or next to the exported file, by default. `element`: whose decision to
    show; `data_dir`: as in `load`; `against`: another run to compare with, with its dictionaries at `against_paths`,
    and then `paths` may be empty; `codebook`: a run of the same model with codebooks at m, of which the page shows the
    codes by activation; `explainer` and `explainer_model`: as in `words.explaining`. Raises UserError as that,
    `dictionaries.read`, `against.read_other` and `codes.read` do.
    """
    # Imported here: matplotlib takes a second, which --help does without.
    from experiments.explaining import against as others
    from experiments.explaining import codes, reading
    from experiments.explaining.dictionaries import READ, SITE, read
    from experiments.explaining.measure import Looks, explain
    from experiments.explaining.page import page
    from experiments.explaining.words import explaining, words
    from experiments.reports.measure import sequences, spread

    path = out or beside(workdir, PAGE)
    lines = out.with_suffix(".jsonl") if out else beside(workdir, LINES)
    kept = lines.with_name(lines.stem + ANSWERS)
    asked = explaining(explainer, explainer_model, len(paths), kept)
    run = bound(load(workdir, step, data_dir))
    refuse_unwritable(path.parent)
    given = read(run, paths, data_dir, sites=(SITE, READ)) if paths or against is None else ()
    deciding, reads = (tuple(each for each in given if each.site == site) for site in (SITE, READ))
    other = others.read_other(run, against, against_paths, data_dir)
    quantized = None if codebook is None else codes.read(run, codebook, data_dir)
    chosen, total = spread(run.task.evaluation_batches(split), examples)
    if not chosen:
        raise UserError(f"the {split} split is empty: there is nothing to explain")
    said = words(run, list(chosen.values()), asked)  # its halves before any feature is looked at
    looks = Looks(run, list(chosen.values()))
    rows = [sequence for example in chosen.values() for sequence in sequences(example)]
    explained = [explain(looks, dictionary, split, rows, element, said) for dictionary in deciding]
    read_by = [reading.by_source(run, dictionary, said) for dictionary in reads]
    compared, shown = others.explain_other(run, deciding, other, list(chosen.values())) if other else (None, None)
    why: dict[str, Any] = {
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
        "run": {"workdir": str(workdir), "step": run.step, "seal": seal(workdir, run.step)},
        "split": split,
        "examples": len(chosen),
        "of": total,
        "model": {
            "name": type(run.model).__name__,
            "features": run.model.config.encoder.layer.features,
            "parameters": run.parameters,
        },
        "model_layers": looks.layers,
        "explainer": said.values(),
        "layers": [layer.values for layer in explained],
        "reading": read_by,
        "against": compared,
        "codes": None,
    }
    if quantized is not None:
        source = {"workdir": str(codebook), "step": quantized.step}
        why["codes"] = {**source, "layers": codes.by_activation(quantized, looks.examples, rows)}
    numbers = path.with_suffix(".json")
    text = page(why, explained, run, rows, shown)
    write_json(numbers, why)
    write_text(lines, "".join(json_line(line) for line in _lines(why)))
    write_text(path, text)
    if unanswered := asked.unanswered():
        logging.warning(unanswered)
    return path, numbers, lines


def _lines(why: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of every feature shown: where it is, its words and their scores, and who said them."""
    for site, layers in (("m", why["layers"]), ("gated", why["reading"])):
        for layer in layers:
            for feature in layer["shown"]:
                place = {"dictionary": layer["dictionary"]["workdir"], "site": site, "layer": layer["layer"]}
                own = {name: feature[name] for name in ("feature", "text", "scores", "asked", "failed", "fires")}
                yield {**place, **own, "explainer": why["explainer"]["name"]}
