"""A trained model as a file to give away, and its model card. All of the card's prose is in `card.md.j2`."""

import dataclasses
import glob
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np

from experiments.common.errors import UserError, require
from experiments.common.files import refuse_unwritable, write_text
from experiments.common.terminal import printable
from experiments.evaluation.evaluator import read_result, seal
from experiments.reports.history import read_history
from experiments.tasks.features import BYTE_VOCABULARY
from experiments.training.exports import Arrays, named, refuse_overwriting, write
from experiments.training.restore import Run, beside, load
from seqboat.interop.to_published import classifier_state, model_arguments
from seqboat.models.classifier import Classifier
from seqboat.models.language_model import LanguageModel
from seqboat.models.retrieval import DualEncoder

TEMPLATE = "card.md.j2"
# How a card begins: what does not is never overwritten.
MARK = "---\nlibrary_name: seqboat\n"
# Of these a result has numbers that say how good the model is.
METRICS = ("accuracy", "bits_per_byte", "loss")


def export(source: Path, out: Path, step: int | None = None, published: bool = False) -> tuple[Path, Path]:
    """Writes the model of a run, at its best step by default, and its card beside it; returns both paths.

    The arrays have our names, or those of the `published` implementation; the config is without paths of this machine.
    Raises UserError for files that are not ours to overwrite, and for a model that has no published form.
    """
    card_path = out.with_suffix(".md")
    refuse_overwriting(out)
    _refuse_overwriting_text(card_path)
    refuse_unwritable(out.parent)
    run = load(source, step)
    values, arrays = portable(run.values), named(run.variables)
    arguments = None
    if published:
        arrays, arguments = as_published(run)
        values = _uncentered(values)
    card = Card(run, arrays, out.name, tuple(results(source, run.step)), activity(source, run.step), arguments)
    data = run.meta.get("data")
    fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
    meta = {
        "names": "published" if published else "seqboat",
        "step": run.step,
        "best": run.best,
        "config": values,
        "versions": run.meta["versions"],
    }
    meta |= {name: run.meta[name] for name in ("hardware", "command") if name in run.meta}
    write(out, arrays, {**meta, "data": {"fingerprint": fingerprint}})
    write_text(card_path, render(card))
    return out, card_path


def portable(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the places of files on this machine: --data_dir finds them again by their names."""
    task = dict(values["task"])
    if isinstance(task.get("files"), list | tuple):
        task["files"] = [PurePath(str(name)).name for name in task["files"]]
    return {**values, "task": task, "data_dir": None}


def as_published(run: Run) -> tuple[Arrays, dict[str, Any]]:
    """The published state dict, and the arguments of its model. Raises UserError for a model without one."""
    if not isinstance(run.model, Classifier):
        raise UserError(f"--names=published: the published model is a classifier, not a {type(run.model).__name__}")
    try:
        return classifier_state(run.variables, run.model.config), model_arguments(run.variables, run.model.config)
    except ValueError as error:
        raise UserError(f"--names=published: {error}") from error


def _uncentered(values: dict[str, Any]) -> dict[str, Any]:
    """The config of the published form, where a centered router's mean is part of its bias."""
    model = values["model"]
    if not model.get("router"):
        return values
    return {**values, "model": {**model, "router": {**model["router"], "centered": False}}}


def _refuse_overwriting_text(path: Path) -> None:
    if not (path.exists() or path.is_symlink()):
        return
    try:
        with path.open(encoding="utf-8") as file:
            ours = file.read(len(MARK)) == MARK
    except (OSError, ValueError):
        ours = False
    require(ours, f"{path}, where the model card goes, is another file: choose another --out, or remove it")


# The card


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card shows: `results` are rows of the metrics of evaluations, `activity` the activation rate and mean
    confidence of every layer, `arguments` those of the published model if the arrays have its names."""

    run: Run
    arrays: Arrays
    file: str
    results: tuple[dict[str, Any], ...]
    activity: dict[str, Any]
    arguments: Mapping[str, Any] | None

    @property
    def data(self) -> dict[str, str]:
        found = self.run.meta.get("data")
        fingerprint = found.get("fingerprint") if isinstance(found, Mapping) else None
        return fingerprint if isinstance(fingerprint, dict) else {}


def render(card: Card) -> str:
    """The card as Markdown; a value of the run cannot end its line or its table cell."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = Code
    source = importlib.resources.files("experiments.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    run = card.run
    hyper = run.values.get("hypernetwork") is not None
    model = getattr(run.model, "target", run.model)
    text = environment.from_string(source).render(
        file=card.file,
        name=Path(card.file).stem,
        task=run.values["task"]["name"],
        kind=type(model).__name__,
        hyper=hyper,
        inputs=_inputs(model),
        generates=not hyper and isinstance(model, LanguageModel) and model.config.vocabulary_size == BYTE_VOCABULARY,
        parameters=run.parameters,
        size=sum(array.nbytes for array in card.arrays.values()),
        step=run.step,
        best=run.best,
        steps=run.values["train"]["steps"],
        results=card.results,
        activity=card.activity,
        arguments=card.arguments and ", ".join(f"{name}={value!r}" for name, value in card.arguments.items()),
        activation=run.values["model"].get("activation"),
        data=card.data,
        meta=run.meta,
    )
    return MARK + text


def _inputs(model: Any) -> str:
    size = getattr(model.config, "vocabulary_size", None)
    if size is None:
        return "numbers (B, L, F), float32"
    return f"ids 0..{size - 1} ({'B, L, 2' if isinstance(model, DualEncoder) else 'B, L'}), int32"


class Code(str):
    """Text within backticks or a block of code, where Markdown has no escapes."""


def _text(value: Any) -> str:
    text = f"{value:,}" if type(value) is int else f"{value:.4f}" if isinstance(value, float) else str(value)
    line = printable(text, but="")
    return line if isinstance(value, Code) else re.sub(r"([][|<>`*])", r"\\\1", line)


def results(source: Path, step: int) -> Iterator[dict[str, Any]]:
    """The evaluations of this checkpoint that the run recorded: those in training, and those of experiments.evaluate,
    of which the checkpoint is identified by its seal."""
    for record in read_history(source, ()).records:
        if record.get("kind") == "evaluation" and record["step"] == step:
            yield from _rows(record, "in training")
    folder, start = beside(source, "x").parent, beside(source, "x").name.removesuffix("x")
    for path in sorted(folder.glob(f"{glob.escape(start)}*_{step}.json")):
        found = read_result(path, source) if seal(source, step) else None
        if found is not None and found.get("step") == step and not found.get("at"):
            yield from _rows(found, str(found.get("protocol")))


def _rows(record: Mapping[str, Any], how: str) -> Iterator[dict[str, Any]]:
    errors = record.get("standard_errors")
    for name in METRICS:
        if isinstance(record.get(name), float):
            error = errors.get(name) if isinstance(errors, Mapping) else None
            yield {"split": record.get("split"), "how": how, "name": name, "value": record[name], "error": error}


def activity(source: Path, step: int) -> dict[str, Any]:
    """The newest record of activation rates up to a step: `where` they were measured, and `rows` of every layer with
    its module's `rate` and `confidence`, or those of several modules; {} without one."""
    found = [record for record in read_history(source, ()).records if record.get("activation_rate")]
    record = next((record for record in reversed(found) if record["step"] <= step), None)
    if record is None:
        return {}
    where = f"{record.get('split', 'train')} split, step {record['step']}"
    arrays = [np.array(record.get(name), float) for name in ("activation_rate", "confidence")]
    rate, confidence = (array.reshape(len(array), -1) for array in arrays)
    many = lambda row: ", ".join(f"{value:.3f}" for value in row)
    pairs = enumerate(zip(rate, confidence, strict=True), start=1)
    return {"where": where, "rows": [{"layer": n, "rate": many(r), "confidence": many(c)} for n, (r, c) in pairs]}
