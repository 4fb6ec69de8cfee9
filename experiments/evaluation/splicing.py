"""What a dictionary's reconstruction, or a transcoder in the place of a feed-forward network, costs a model: metrics of
a split as it is, spliced, and ablated."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.errors import UserError, require
from experiments.evaluation.examples import Scores, score
from experiments.tasks import activations
from experiments.training.activations import made_of
from experiments.training.experiment import read_config, read_task
from experiments.training.metrics import plain
from experiments.training.restore import Run, bound, load, seal
from experiments.training.step import apply, means, one_element
from seqboat.interp.edits import Edit, Replace, Splice, Transcode, at
from seqboat.layers import taps
from seqboat.models import dictionary


@dataclasses.dataclass(frozen=True)
class Splicing:
    """A trained dictionary, `atoms`, of a `site` in a `layer`, from 1, read from `origin`; of a transcoder, `site` is
    what it writes, and `reads` the site that it is computed from."""

    site: str
    layer: int
    atoms: Any
    origin: Path
    step: int
    reads: str | None = None

    @property
    def place(self) -> str:
        return f"{self.site} of layer {self.layer}" + ("" if self.reads is None else f" (computed from {self.reads})")

    def into(self, run: Run) -> Run:
        """The run with the values replaced by their reconstructions. Raises UserError as `edited`."""
        edit = Splice(True, self.atoms) if self.reads is None else Transcode(True, self.atoms, self.reads)
        return edited(run, self.site, self.layer, edit)

    def record(self, metric: str, **scores: Scores) -> dict[str, Any]:
        """What an evaluation says of it: which dictionary this is, and by name the loss and a metric of `scores`."""
        own = {"workdir": str(self.origin), "step": self.step, "seal": seal(self.origin, self.step)}
        found = {how: means(each.total) for how, each in scores.items()}
        names = dict.fromkeys((metric, "loss"))
        metrics = {how: {name: plain(each[name]) for name in names} for how, each in found.items()}
        return {**own, "site": self.site, "reads": self.reads, "layer": self.layer, "metrics": metrics}


def of(run: Run, origin: Path) -> Splicing:
    """The dictionary or transcoder in the work directory or exported file `origin`, made for this run.

    Raises UserError for what is neither, and for one of another run or step.
    """
    found, where = load(origin), f"--splice={origin}"
    require(
        isinstance(found.model, dictionary.Dictionary),
        f"{where} holds a {type(found.model).__name__}: expected a dictionary or a transcoder (configs/interp)",
    )
    _, task = read_task(read_config(found.values))
    require(isinstance(task, activations.Config), f"{where} was not trained on activations of a run")
    hint = "" if task.step == run.step else f"; --step={task.step} evaluates that one"
    require(
        made_of(found.meta, task, run),
        f"{where} is a dictionary of step {task.step} of {task.run}, not of step {run.step} of {run.origin}{hint}",
    )
    atoms = dictionary.atoms(found.variables, found.model.config)
    ends = (task.site, None) if task.target_site is None else (task.target_site, task.site)
    return Splicing(ends[0], task.layer, atoms, origin, found.step, ends[1])


def edited(run: Run, site: str, layer: int, edit: Edit) -> Run:
    """The run with the values of a site in a layer, from 1, changed; a hypernetwork's at its middle hyper-input.

    Raises UserError for a site or a layer that the model lacks, and for an edit that does not fit.
    """
    run = bound(run)
    try:
        layers = run.model.config.encoder.layers
        variables = taps.edited(run.model, run.variables, {site: at(layer, layers, edit)})
        jax.eval_shape(lambda: apply(run.model, variables, one_element(run.task.example()), False, ()))
    except ValueError as error:
        raise UserError(f"{site} of layer {layer}: {error}") from error
    return dataclasses.replace(run, variables=variables)


def costs(run: Run, split: str, site: str, layer: int, atoms: Any) -> dict[str, dict[str, Any]]:
    """The metrics as they are (`plain`), with the values of a site in a layer, from 1, `spliced` by a dictionary
    (`seqboat.interp.dictionaries.Atoms`), and with them `ablated` to their mean over the split.

    The share of the ablated loss that the dictionary recovers flatters it where ablation costs more than chance:
    compare all three. Raises UserError as `edited`.
    """
    spliced = edited(run, site, layer, Splice(True, atoms))  # first, for it may be refused
    runs = {"plain": bound(run), "spliced": spliced, "ablated": ablated(run, split, site, layer)}
    return {name: means(score(each, split).total) for name, each in runs.items()}


def losses(run: Run, split: str, site: str, layer: int, atoms: Any) -> dict[str, float]:
    """The three mean losses of `costs`."""
    return {name: found["loss"] for name, found in costs(run, split, site, layer, atoms).items()}


def ablated(run: Run, split: str, site: str, layer: int) -> Run:
    """The run with the values of a site in a layer replaced by their mean over a split."""
    return edited(run, site, layer, Replace(True, mean(run, split, site, layer)))


def mean(run: Run, split: str, site: str, layer: int) -> np.ndarray:
    """The mean of a site's values in a layer over the elements of a split where they are computed."""
    run = bound(run)
    read = reader(run, site, layer)

    @jax.jit
    def sums(variables: Any, batch: Any) -> Any:
        value, there = read(variables, batch)
        mask = there.reshape(*there.shape, *[1] * (value.ndim - 2))
        return jnp.where(mask, value, 0).sum((0, 1)), there.sum()

    parts = [jax.device_get(sums(run.variables, batch)) for batch in run.task.evaluation_batches(split)]
    total, count = (sum(part) for part in zip(*parts, strict=True))
    return total / np.maximum(count, 1)


def reader(run: Run, site: str, layer: int) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """A function of variables and a batch: the values of a site in a layer (B, L, ...), and where they are computed
    (B, L): at elements that are not padding and, within a sparse module, active."""
    block = run.model.config.encoder.layer

    def read(variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        found = run.experiment.functions.evaluate_examples(variables, batch, tapped=True).taps
        return taps.read(found, site)[layer - 1], taps.computed(found, block, site, batch["lengths"])[layer - 1]

    return read
