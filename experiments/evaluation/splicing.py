"""What a dictionary's reconstruction costs a model: three losses of a split."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.errors import UserError
from experiments.evaluation.examples import score
from experiments.training.restore import Run, bound
from experiments.training.step import means
from seqboat.interp.edits import Edit, Replace, Splice, at
from seqboat.layers import taps

# Which module's decisions say where a site within a sparse module is computed.
MODULES = {"gau": 0, "unit": 0, "feed_forward": -1}


def losses(run: Run, split: str, site: str, layer: int, atoms: Any) -> dict[str, float]:
    """The mean loss as it is (`plain`), with the values of a site in a layer, from 1, `spliced` by a dictionary
    (`seqboat.interp.dictionaries.Atoms`), and with them `ablated` to their mean over the split.

    The share of the ablated loss that the dictionary recovers flatters it where ablation costs more than chance:
    compare all three. Raises UserError for a site or a layer that the model lacks, and for a dictionary of another
    site.
    """
    run = bound(run)

    def loss(edit: Edit | None) -> float:
        edits = {} if edit is None else taps.write(run.model, {site: at(layer, run.model.config.encoder.layers, edit)})
        edited = dataclasses.replace(run, variables={**run.variables, "edits": edits})
        return means(score(edited, split).total)["loss"]

    try:
        spliced = loss(Splice(True, atoms))  # first, for it may be refused
        ablated = loss(Replace(True, mean(run, split, site, layer)))
        return {"plain": loss(None), "spliced": spliced, "ablated": ablated}
    except ValueError as error:
        raise UserError(f"{site} of layer {layer}: {error}") from error


def mean(run: Run, split: str, site: str, layer: int) -> np.ndarray:
    """The mean of a site's values in a layer over the elements of a split where they are computed: those that are not
    padding and, within a sparse module, active."""
    owner = next(owner for owner, sites in run.model.config.encoder.layer.sites().items() if site in sites)

    @jax.jit
    def sums(variables: Any, batch: Any) -> Any:
        examined = run.experiment.functions.evaluate_examples(variables, batch, tapped=True)
        value = taps.read(examined.taps, site)[layer - 1]
        there = jnp.arange(value.shape[1])[None] < batch["lengths"].reshape(-1, 1)
        if owner in MODULES and examined.output.layers.active.shape[-1]:
            there = taps.read(examined.taps, "active")[layer - 1, ..., MODULES[owner]]
        mask = there.reshape(*there.shape, *[1] * (value.ndim - 2))
        return jnp.where(mask, value, 0).sum((0, 1)), there.sum()

    parts = [jax.device_get(sums(run.variables, batch)) for batch in run.task.evaluation_batches(split)]
    total, count = (sum(part) for part in zip(*parts, strict=True))
    return total / np.maximum(count, 1)
