"""The taps of a trained run at one site, batch by batch: where the task `activations` gets its rows."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.errors import UserError
from experiments.data.sources import Batch
from experiments.tasks.activations import Config
from experiments.training.models import encodes_inputs
from experiments.training.restore import Run, bound, load, seal
from experiments.training.step import apply, one_element
from seqboat.layers import taps

WHERE = "config.task"
HOW = "--config.task.run=DIR; python -m experiments.train --config=configs/synthetic/tokfsm.py:credit_router "
HOW += "--workdir=DIR trains one"


# The name of the source in the fingerprint of its activations.
SOURCE = f"{WHERE}.run"


def described(config: Config, run: Run) -> str:
    """Which activations of a run a complete config names."""
    ends = " -> ".join(filter(None, (config.site, config.target_site)))
    place = f"{ends} of layer {config.layer}, {config.rows} rows, step {run.step}"
    return f"{place}, seal {seal(Path(run.origin), run.step)}"


def made_of(meta: Mapping[str, Any], config: Config, run: Run) -> bool:
    """Whether a checkpoint of the task, by its meta and complete config, was trained on this very step of the run."""
    data = meta.get("data")
    fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
    return isinstance(fingerprint, Mapping) and fingerprint.get(SOURCE) == described(config, run)


class Activations:
    """`experiments.tasks.activations.Source` of a run with layers.

    Raises UserError for a run that cannot be read, has no layers, or lacks the layer or the site.
    """

    def __init__(self, config: Config, data_dir: str | None = None):
        run = self._run = _load(config, data_dir)
        if not encodes_inputs(run.model):
            raise UserError(
                f"{WHERE}.run={config.run!r} holds a {type(run.model).__name__}: expected a model with layers, as a "
                "classifier or a language model"
            )
        encoder = run.model.config.encoder
        if config.layer > encoder.layers:
            raise UserError(f"{WHERE}.layer={config.layer}: {config.run} has the layers 1..{encoder.layers}")
        example = run.task.example()
        self.positions, self.splits = example["inputs"].shape[1] * example["lengths"].size, run.task.splits
        found = jax.eval_shape(lambda: _taps(run, run.variables, one_element(example)))
        # By name, whether only active elements have a value.
        sites = {
            path[-1].key: path[-2].key == "sparse"
            for path, _ in jax.tree_util.tree_leaves_with_path(found)
            if path[-1].key not in ("active", "confidence")
        }
        for field in ("site", "target_site"):
            if (name := getattr(config, field)) is not None and name not in sites:
                raise UserError(f"{WHERE}.{field}={name!r}: {config.run} has the sites {', '.join(sorted(sites))}")
        width = lambda name: name and jax.eval_shape(lambda found: _vectors(found, name), found).shape[-1]
        # The GAU is the first module, a feed-forward network the last.
        routed = {-1 if name.startswith("feed_forward") else 0 for name in self._sites(config) if sites[name]}
        self._modules = sorted(routed or {0})
        self.config = dataclasses.replace(
            config,
            step=run.step,
            rows=config.rows or ("active" if routed else "all"),
            width=width(config.site),
            target_width=width(config.target_site),
        )
        self._look = jax.jit(self._values)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Which activations these are: another source, or another run of the same steps, has another."""
        return {SOURCE: described(self.config, self._run), **self._run.task.fingerprint}

    def rows(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, one array if they are the same, of consecutive batches of a split, or "train"."""
        task = self._run.task
        batches: Iterator[Batch] = map(task.train_batch, range(first, first + count))
        if split != "train":
            batches = itertools.islice(task.evaluation_batches(split), first, first + count)
        found = []
        for batch in batches:
            chosen, *values = jax.device_get(self._look(self._run.variables, batch))
            found.append([value[chosen] for value in values])
        parts = [np.concatenate(part) for part in zip(*found, strict=True)]
        return parts[0], parts[-1]

    @staticmethod
    def _sites(config: Config) -> list[str]:
        """The site of the inputs, and that of the targets if it is another."""
        return [config.site, *filter(None, [config.target_site])]

    def _values(self, variables: Any, batch: Mapping[str, Any]) -> list[jax.Array]:
        """Which of the N elements are asked for, (N,), and the values at one or two sites, (N, W)."""
        config, found = self.config, _taps(self._run, variables, batch)
        values = [_vectors(found, name)[config.layer - 1].astype(jnp.float32) for name in self._sites(config)]
        if config.rows == "active":
            chosen = taps.read(found, "active")[config.layer - 1][..., jnp.array(self._modules)].all(-1)
        else:
            chosen = jnp.arange(batch["inputs"].shape[1])[None] < batch["lengths"].reshape(-1, 1)
        return [chosen.reshape(-1), *values]


def _load(config: Config, data_dir: str | None) -> Run:
    if config.run is None:
        raise UserError(f"{WHERE}.run=None: name the run whose activations are read, {HOW}")
    try:
        return bound(load(config.run, config.step, data_dir))
    except UserError as error:
        raise UserError(f"{WHERE}.run={config.run!r}: {error}") from error


def _taps(run: Run, variables: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    _, found = apply(run.model, variables, batch, False, ("taps",))
    return found["taps"]


def _vectors(found: Any, name: str) -> Any:
    """Every layer's values of a tap as vectors (layers, N, W) of the N elements of the batch; heads are joined."""
    value = taps.read(found, name)
    return value.reshape(len(value), math.prod(value.shape[1:3]), -1)
