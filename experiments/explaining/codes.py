"""Codes by activation: which content makes a layer attend, by the codes of a run with codebooks at m.

The router reads m alone, so behind codebooks its decision is a function of the codes: their table is the router.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.config import differences
from experiments.common.errors import UserError
from experiments.explaining.contexts import contexts
from experiments.reports.measure import Example, batches
from experiments.training.restore import Run, bound, load
from seqboat.interp.codebooks import Codebook, nearest
from seqboat.layers import taps

SITE = "m"
SHOWN = 5  # codes of a layer that attend, and as many that do not


def read(run: Run, path: Path, data_dir: str | None = None) -> Run:
    """The run with codebooks at `path`, bound. Raises UserError for one without, or of another model or task."""
    found, where = load(path, data_dir=data_dir), f"--codebook: {path}"
    codebook = found.values.get("codebook")
    if codebook is None or SITE not in codebook["sites"]:
        raise UserError(f"{where} has no codebooks at {SITE}: the config's variant :codebook trains them")
    for group in ("model", "task"):
        if changed := differences(run.values[group], found.values[group], f"config.{group}"):
            raise UserError(f"{where} is not of a model as in {run.origin}: {changed[0]}")
    return bound(found)


def by_activation(run: Run, examples: list[Example], rows: list[tuple[np.ndarray, int]]) -> list[dict[str, Any]]:
    """Of every layer of a bound run: the `rate` of activation, how many codes there are and are `in_use`, the share of
    the decisions' entropy that the codes of a token tell, `information`, and the codes with the largest `excess`:
    activations at their tokens less those of as many tokens at the mean rate; then those with the least."""
    book = taps.written(run.variables["edits"])[SITE]
    parts = zip(*_looks(run, book, examples), strict=True)
    codes, active, valid = (np.concatenate(part, axis=axis) for part, axis in zip(parts, (1, 1, 0), strict=True))
    layers = zip(codes, active, strict=True)
    return [{"layer": n, **_of_layer(run.task, *each, valid, book, rows)} for n, each in enumerate(layers, 1)]


def _looks(run: Run, book: Codebook, examples: list[Example]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Codes (layers, n, L, G, k), decisions (layers, n, L) and what is not padding (n, L), batch by batch."""

    @jax.jit
    def look(variables: Any, batch: Any) -> Any:
        found = run.experiment.functions.evaluate_examples(variables, batch, tapped=True).taps
        codes = jax.vmap(lambda m, table: nearest(m, table, book.k))(taps.read(found, SITE), book.table)
        return codes, taps.read(found, "active")[..., 0]

    for batch, count in batches(examples):
        codes, active = jax.device_get(look(run.variables, batch))
        rows = count * batch["lengths"][0].size  # two documents of a pair are two sequences
        valid = np.arange(active.shape[2])[None] < batch["lengths"].reshape(-1)[:rows, None]
        yield codes[:, :rows], active[:, :rows], valid


def _of_layer(
    task: Any, codes: np.ndarray, active: np.ndarray, valid: np.ndarray, book: Codebook, rows: list[Any]
) -> dict[str, Any]:
    _, groups, size, _ = book.table.shape
    numbers = codes + size * np.arange(groups)[:, None]  # the same code of another group is another
    own, on = numbers[valid].reshape(valid.sum(), -1), active[valid]
    count = np.bincount(own.ravel(), minlength=groups * size)
    attends = np.bincount(own[on].ravel(), minlength=groups * size)
    rate = float(on.mean())
    excess = attends - rate * count
    order = np.argsort(-excess, kind="stable").tolist()
    chosen = [code for code in order[:SHOWN] if excess[code] > 0]
    chosen += [code for code in order[::-1][:SHOWN] if excess[code] < 0]
    return {
        "rate": rate,
        "codes": groups * size,
        "in_use": int((count > 0).sum()),
        "information": information(own, on),
        "shown": [
            {
                "code": code,
                "count": int(count[code]),
                "attends": float(attends[code] / count[code]),
                "lift": float(attends[code] / count[code] / rate) if rate else None,
                "excess": float(excess[code]),
                "contexts": contexts(task, rows, ((numbers == code).any((-2, -1)) & valid).astype(np.float32)),
            }
            for code in chosen
        ],
    }


def information(codes: np.ndarray, active: np.ndarray) -> float | None:
    """I(codes; active) / H(active) of N tokens with codes (N, n), None if the decisions are all the same."""
    _, ids = np.unique(codes, axis=0, return_inverse=True)
    joint = np.zeros((ids.max() + 1, 2))
    np.add.at(joint, (ids.ravel(), active.astype(int)), 1)
    whole = _entropy(joint.sum(0))
    return (whole + _entropy(joint.sum(1)) - _entropy(joint.ravel())) / whole if whole > 0 else None


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
