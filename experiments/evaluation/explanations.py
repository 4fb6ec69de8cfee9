"""What units of a run fire on in words, made on some sequences and scored on the others (Paulo et al. 2024, arXiv
2410.13928): `seqboat.interp.explainers` and `seqboat.interp.scorers` for many units of the same tokens.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.training.restore import Run
from experiments.training.step import apply
from seqboat.interp import scorers
from seqboat.interp.edits import Without, at
from seqboat.interp.explainers import Contexts, Explainer, Explanation, Judge, PredicateExplainer, Record, RuleJudge
from seqboat.layers import taps

WIDTH = 16  # tokens of a window that a judge is asked about


class Scored(NamedTuple):
    """A unit with its explanation, and the scores of that."""

    unit: int
    explanation: Explanation
    simulation: scorers.Simulation
    detection: scorers.Detection
    fuzzing: scorers.Score

    @property
    def asked(self) -> int:
        """Questions, and elements of the simulation."""
        return sum(each.asked for each in (self.simulation, *self.detection, self.fuzzing))

    @property
    def failed(self) -> int:
        """Those without an answer."""
        return sum(each.failed for each in (self.simulation, *self.detection, self.fuzzing))

    def scores(self) -> dict[str, float | None]:
        """The numbers of SCORES, None where nothing determines one."""
        found = {name: read(self) for name, read in SCORES.items()}
        return {name: float(value) if np.isfinite(value) else None for name, value in found.items()}


SCORES: dict[str, Callable[[Scored], float]] = {
    "simulation": lambda found: found.simulation.correlation,
    "f1": lambda found: found.simulation.f1,
    "detection": lambda found: found.detection.random.balanced_accuracy,
    "detection_auc": lambda found: found.detection.random.auc,
    "detection_f1": lambda found: found.detection.random.f1,
    "detection_near": lambda found: found.detection.near.balanced_accuracy,
    "fuzzing": lambda found: found.fuzzing.balanced_accuracy,
}
# What tables show, in order, with the titles; the intervention score is of several units (`effects`).
COLUMNS = {
    "simulation": "simulation",
    "f1": "F1, natural rate",
    "detection": "detection",
    "detection_near": "against the nearest",
    "detection_auc": "AUC",
    "fuzzing": "fuzzing",
    "intervention": "intervention",
}


class Method(NamedTuple):
    """Who explains, and who judges the words: detection and fuzzing ask about at most `windows` of each kind.
    Simulation asks about every element, or, `windowed`, about one random window of every sequence."""

    explainer: Explainer
    judge: Judge
    windows: int = 50
    windowed: bool = False


PREDICATES = Method(PredicateExplainer(), RuleJudge())


class Halves(NamedTuple):
    """Sequences in two parts: explanations are made from those of `first` (n,) and scored on the others."""

    first: Bool[np.ndarray, " n"]
    made: Contexts
    scored: Contexts


def halves(contexts: Contexts, first: Bool[np.ndarray, " n"]) -> Halves:
    return Halves(first, contexts.rows(first), contexts.rows(~first))


Unit = tuple[int, Float[np.ndarray, "n L"], Float[np.ndarray, "n L"] | None]


def explained(method: Method, parts: Halves, units: Iterable[Unit], seed: int) -> Iterator[Scored]:
    """Units with their activations and those of the nearest other one, or None: explained on the first part of the
    sequences and scored on the other; `seed` draws the windows."""
    first, judge = parts.first, method.judge
    for unit, activations, nearest in units:
        explanation = method.explainer.explain(Record(parts.made, activations[first]))
        record, other = Record(parts.scored, activations[~first]), None if nearest is None else nearest[~first]
        asked = _windowed(record, seed) if method.windowed else record
        yield Scored(
            unit,
            explanation,
            scorers.simulation(judge, explanation, asked),
            scorers.detection(judge, explanation, record, other, width=WIDTH, count=method.windows, seed=seed),
            scorers.fuzzing(judge, explanation, record, width=WIDTH, count=method.windows, seed=seed),
        )


def _windowed(record: Record, seed: int) -> Record:
    """One random window of every sequence, among those with an element shown."""
    tokens, shown = record.contexts.tokens, record.contexts.shown
    last = np.where(shown, np.arange(tokens.shape[1]), 0).max(1) // WIDTH
    chosen = np.random.default_rng(seed).integers(0, last + 1)
    inside = np.arange(tokens.shape[1]) // WIDTH == chosen[:, None]
    return Record(Contexts(tokens, record.contexts.symbol, shown & inside), record.activations)


def answers(run: Run) -> bool:
    """Whether a run predicts symbols or classes, so that removing a unit changes log-probabilities."""
    batch = run.task.example()
    logits = jax.eval_shape(lambda batch: apply(run.model, run.variables, batch, False, ())[0].logits, batch)
    targets = np.asarray(batch["targets"])
    return jnp.issubdtype(targets.dtype, jnp.integer) and logits.shape[:-1] == targets.shape


def effects(
    run: Run,
    site: str,
    layer: int,
    atoms: Any,
    units: Sequence[int],
    active: Bool[np.ndarray, "F n L"],
    batches: Sequence[Mapping[str, Any]],
) -> dict[int, Float[np.ndarray, "2 V"]]:
    """What `scorers.intervention` needs of units that fire where they are `active`: the change of the mean
    log-probability of every symbol or class if a unit is taken out of a site of a layer, from 1, where it fires, on two
    halves of the sequences, every other one. Units that fire in one half alone are left out.

    For an answer to a whole sequence those where the unit fires count. The `batches` have the n sequences in order;
    further rows of the last one are filling.
    """
    rows = [len(batch["targets"]) for batch in batches]
    where = _where(active, batches[0]["targets"].ndim > 1, batches[0]["lengths"].size // rows[0])
    count = where.reshape(len(units), 2, -1).sum(2)
    fires = np.flatnonzero(count.all(1)).tolist()
    padding = [(0, 0), (0, 0), (0, sum(rows) - where.shape[2]), *[(0, 0)] * (where.ndim - 3)]
    parts = np.split(np.pad(where, padding).astype(np.float32), np.cumsum(rows)[:-1], axis=2)
    layers = run.model.config.encoder.layers

    def without(unit: int, where: bool) -> Float[np.ndarray, "F 2 V"]:
        edit = at(layer, layers, Without(where, atoms, jnp.array([unit])))
        variables = taps.edited(run.model, run.variables, {site: edit})
        each = [_totals(run.model, variables, batch, part) for batch, part in zip(batches, parts, strict=True)]
        return np.asarray(np.sum(jax.device_get(each), axis=0, dtype=np.float64))

    if not fires:
        return {}
    before = without(units[0], False)  # by the program of those below
    return {units[n]: (without(units[n], True) - before)[n] / count[n][:, None] for n in fires}


def _where(active: Bool[np.ndarray, "F n L"], each: bool, documents: int) -> Bool[np.ndarray, "F 2 *B"]:
    """Which answers are of units that fire, in either half of the examples: with an answer for `each` element those
    there, and else those of the example; `documents` sequences are an example."""
    found = active.reshape(len(active), -1, documents, active.shape[2]).max(2)
    found = found if each else found.max(2)
    half = (np.arange(found.shape[1]) % 2).reshape(-1, *[1] * (found.ndim - 2))
    return np.stack([found & (half == number) for number in (0, 1)], axis=1)


@functools.partial(jax.jit, static_argnums=0)  # all units share a program, and dictionaries of one shape
def _totals(model: Any, variables: Any, batch: Any, where: Float[Array, "F 2 *B"]) -> Float[Array, "F 2 V"]:
    output, _ = apply(model, variables, batch, False, ())
    p = jax.nn.log_softmax(output.logits.astype(jnp.float32))
    return where.reshape(*where.shape[:2], -1) @ p.reshape(-1, p.shape[-1])
