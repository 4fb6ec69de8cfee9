"""Whether features of a dictionary can be said in words better than channels (Paulo et al. 2024, arXiv 2410.13928).

    python -m experiments.study --study=explainers --workdir=runs/explainers --check

Trains TokFSM and a dictionary of m of its second layer, 256 features of which 4 a token, as the study `dictionaries`
does; finished runs in the work directory are reused. Rules by `PredicateExplainer` are made from one half of some test
sequences, which is drawn before anything else, and scored by `RuleJudge` on the other. Controls, with as many units a
token: the channels that are farthest from their mean, of either sign, and random unit directions. A feature names a
state if a clause of its rule has both digits, in their place, of the state where it fires most often.

There is no language model here: `experiments.explaining.chat` has the client, and these bars say nothing of one.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.evaluation import agreement
from experiments.evaluation.agreement import SITE
from experiments.studies import dictionaries
from experiments.studies.dictionaries import SPLIT, Plan
from experiments.studies.protocol import Bar, judge, ranged
from experiments.tasks.tokfsm import BASE, FIRST_DIGIT
from experiments.training.restore import Run
from experiments.training.step import apply
from seqboat.interp import scorers
from seqboat.interp.dictionaries import Atoms
from seqboat.interp.edits import Without, at
from seqboat.interp.explainers import Contexts, Explanation, PredicateExplainer, Record, RuleJudge, split
from seqboat.interp.predicates import Rule
from seqboat.layers import taps

FOLDER = "insight"

# The bars, in the worst seed.
SIMULATION_OVER_CHANNELS = 0.15
F1_OVER_CHANNELS = 0.12  # at the natural rate of activation
OVER_DIRECTIONS = 0.0  # of both
LEAST_NAMED = 0.7  # of features with an F1 above GOOD, those that name a state

GOOD = 0.9
LAYER, FEATURES_A_TOKEN = 2, 4
BATCHES = 16  # of the test split
UNITS = 100  # of every arm that are explained, drawn from those that fire
LEAST_FIRES = 20  # tokens of the first half
EDITED = 20  # units of every arm that are taken away
SHOWN = 12  # explanations of every arm in the result
PLAN = Plan(range(10, 13), dictionary={"model.k": FEATURES_A_TOKEN}, layers=(LAYER,))

# The scores of a unit whose mean is in a row: a name and where it is among them.
SCORES: dict[str, Callable[["Scored"], float]] = {
    "simulation": lambda found: found.simulation.correlation,
    "f1": lambda found: found.simulation.f1,
    "detection": lambda found: found.detection.random.balanced_accuracy,
    "detection_auc": lambda found: found.detection.random.auc,
    "detection_f1": lambda found: found.detection.random.f1,
    "detection_near": lambda found: found.detection.near.balanced_accuracy,
    "fuzzing": lambda found: found.fuzzing.balanced_accuracy,
}
COLUMNS = {
    "simulation": "simulation",
    "f1": "F1, natural rate",
    "detection": "detection",
    "detection_near": "against the nearest",
    "detection_auc": "AUC",
    "fuzzing": "fuzzing",
    "intervention": "intervention",
}


class Scored(NamedTuple):
    """A unit of an arm with its explanation and scores; `named` is whether the rule names its state."""

    unit: int
    explanation: Explanation
    simulation: scorers.Simulation
    detection: scorers.Detection
    fuzzing: scorers.Score
    named: bool

    @property
    def failed(self) -> int:
        return sum(each.failed for each in (self.simulation, *self.detection, self.fuzzing))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Some test sequences of a run: batches, contexts, m (n, L, D), true states (n, L), and the `first` half (n,)."""

    batches: Sequence[Mapping[str, Any]]
    contexts: Contexts
    m: Float[np.ndarray, "n L D"]
    states: np.ndarray
    first: Bool[np.ndarray, " n"]


def study(save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(10, 13)) -> list[Bar]:
    """The recipes as they are, but for the number of features of a token."""
    return run(dataclasses.replace(PLAN, seeds=seeds), workdir, save)


def run(plan: Plan, directory: Path, save: Callable[[dict[str, Any]], None]) -> list[Bar]:
    """Every seed and arm; saves after each, and returns the bars. Raises Stopped if a run is asked to stop."""
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {"seeds": list(plan.seeds), "layer": plan.layers[0]}
    for seed in plan.seeds:
        model = dictionaries.model(plan, seed, directory / f"seed_{seed}", True)
        (layer,) = plan.layers
        atoms = dictionaries.trained_atoms(plan, model, SITE, layer, plan.sites[SITE])
        found = see(model, layer, seed)
        for name, each in arms(atoms, found).items():
            rows.append({"seed": seed, "arm": name, **measured(model, layer, each, found, seed)})
            save({**about, "rows": rows, "bars": bars(rows), "config": model.values})
            means = {name: None if value is None else round(value, 3) for name, value in rows[-1]["scores"].items()}
            print(f"seed {seed}, {name}: {means}", flush=True)
    return bars(rows)


def see(model: Run, layer: int, seed: int) -> Seen:
    """The first BATCHES of a split; sequences of TokFSM have no padding."""
    batches = list(itertools.islice(model.task.evaluation_batches(SPLIT), BATCHES))
    join = lambda arrays: np.concatenate([np.asarray(array) for array in arrays])
    tokens = join(batch["inputs"] for batch in batches)
    states = join(model.task.truth(batch)["state"] for batch in batches)
    m = agreement.see(model, batches).m[layer - 1]
    return Seen(batches, Contexts(tokens, model.task.symbol), m, states, split(len(tokens), seed))


def arms(atoms: Atoms, found: Seen) -> dict[str, Atoms]:
    """The dictionary and its controls, which are fitted to the first half."""
    x = found.m[found.first].reshape(-1, found.m.shape[-1])
    return {
        "dictionary": atoms,
        "channels": dictionaries.largest_channels(x, atoms.k),
        "directions": dictionaries.random_atoms(x, atoms),
    }


def measured(model: Run, layer: int, atoms: Atoms, found: Seen, seed: int) -> dict[str, Any]:
    """The row of an arm: mean scores over units, and those of some."""
    f = np.asarray(jax.jit(Atoms.encode)(atoms, jnp.asarray(found.m)))
    units = chosen(f[found.first], seed)
    scored = list(explained(f, units, np.asarray(atoms.decoder), found, seed))
    scores: dict[str, float | None] = {name: _mean([read(each) for each in scored]) for name, read in SCORES.items()}
    effects = removed(model, layer, atoms, f, units[:EDITED], found)
    scores["intervention"] = _mean(scorers.intervention(effects)) if len(effects) > 1 else None
    good = [each for each in scored if each.simulation.f1 > GOOD]
    return {
        "units": len(scored),
        "alive": int((f[found.first] > 0).any((0, 1)).sum()),
        "size": f.shape[-1],
        "l0": float((f > 0).sum(-1).mean()),
        "scores": scores,
        "failed": sum(each.failed for each in scored),
        "good": len(good),
        "named": float(np.mean([each.named for each in good])) if good else None,
        "edited": len(effects),
        "examples": [
            {
                "unit": each.unit,
                "text": each.explanation.text,
                "named": each.named,
                **{name: read(each) for name, read in SCORES.items()},
            }
            for each in scored[:SHOWN]
        ],
    }


def chosen(f: Float[np.ndarray, "n L F"], seed: int) -> list[int]:
    """Up to UNITS units, in random order, of those that fire at LEAST_FIRES tokens or more."""
    possible = np.flatnonzero((f > 0).sum((0, 1)) >= LEAST_FIRES)
    return np.random.default_rng(seed).permutation(possible)[:UNITS].tolist()


def explained(
    f: Float[np.ndarray, "n L F"], units: Sequence[int], decoder: Float[np.ndarray, "F W"], found: Seen, seed: int
) -> Iterator[Scored]:
    """Units explained on the first half and scored on the other."""
    explainer, rule_judge = PredicateExplainer(), RuleJudge()
    first, other = found.contexts.rows(found.first), found.contexts.rows(~found.first)
    alive = (f[found.first] > 0).any((0, 1))
    nearest = scorers.nearest(decoder, alive) if units and alive.sum() > 1 else None
    for unit in units:
        explanation = explainer.explain(Record(first, f[found.first, :, unit]))
        record = Record(other, f[~found.first, :, unit])
        near = None if nearest is None else f[~found.first, :, nearest[unit]]
        yield Scored(
            unit,
            explanation,
            scorers.simulation(rule_judge, explanation, record),
            scorers.detection(rule_judge, explanation, record, near, seed=seed),
            scorers.fuzzing(rule_judge, explanation, record, seed=seed),
            names_state(explanation.rule or Rule(), record.active, found.states[~found.first]),
        )


def names_state(rule: Rule, active: Bool[np.ndarray, "n L"], states: np.ndarray) -> bool:
    """Whether a clause has both digits of the state where a unit fires most often, at their distance from there: the
    last digit is read at even positions, and was read one token before at odd ones."""
    where = active & (states >= 0)
    if not where.any():
        return False
    odd = np.broadcast_to(np.arange(states.shape[1]) % 2, states.shape)
    (state, lag), _ = collections.Counter(zip(states[where].tolist(), odd[where].tolist(), strict=True)).most_common(1)[
        0
    ]
    first, last = (FIRST_DIGIT + digit for digit in divmod(state, BASE))
    return any({(lag + 1, first), (lag, last)} <= _fixed(clause) for clause in rule.clauses)


def _fixed(clause: Sequence[Any]) -> set[tuple[int, int]]:
    """(lag, symbol) that a clause demands."""
    fixed: set[tuple[int, int]] = set()
    for kind, numbers in clause:
        if kind == "symbol" and len(numbers) == 2:
            fixed.add(numbers)
        if kind == "pair":
            lag, first, last = numbers
            fixed |= {(lag + 1, first), (lag, last)}
    return fixed


def removed(
    model: Run, layer: int, atoms: Atoms, f: Float[np.ndarray, "n L F"], units: Sequence[int], found: Seen
) -> Float[np.ndarray, "F 2 V"]:
    """The change of the mean log-probabilities if a unit is taken away, where it fires, on the two halves of the
    sequences that it is not explained on; units that fire in one half alone are left out."""
    other = np.flatnonzero(~found.first)
    batches = jax.tree.map(lambda *arrays: np.concatenate([np.asarray(a) for a in arrays])[other], *found.batches)
    half = np.arange(len(other)) % 2
    before = _log_probabilities(model.model, model.variables, batches)
    layers, effects = model.model.config.encoder.layers, []
    for unit in units:
        active = f[other, :, unit] > 0
        if not all(active[half == each].any() for each in (0, 1)):
            continue
        edit = at(layer, layers, Without(True, atoms, jnp.array([unit])))
        after = _log_probabilities(model.model, taps.edited(model.model, model.variables, {SITE: edit}), batches)
        change = np.asarray(after - before)
        effects.append([change[half == each][active[half == each]].mean(0) for each in (0, 1)])
    return np.array(effects).reshape(-1, 2, before.shape[-1])


@functools.partial(jax.jit, static_argnums=0)  # all units of an arm share a program
def _log_probabilities(model: Any, variables: Any, batch: Any) -> Array:
    output, _ = apply(model, variables, batch, False, ())
    return jax.nn.log_softmax(output.logits.astype(jnp.float32))


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else None


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Every bar with its value in the worst of the seeds that have all arms. Without a feature of a high F1 none names
    a state."""
    by_seed: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["arm"]] = row
    whole = [each for each in by_seed.values() if len(each) == 3]
    if not whole:
        return []
    score = lambda each, arm, name: each[arm]["scores"][name] or 0.0
    over = lambda arm, name: [score(each, "dictionary", name) - score(each, arm, name) for each in whole]
    return [
        judge("simulation over channels", over("channels", "simulation"), SIMULATION_OVER_CHANNELS),
        judge("F1 at the natural rate over channels", over("channels", "f1"), F1_OVER_CHANNELS),
        judge("simulation over random directions", over("directions", "simulation"), OVER_DIRECTIONS),
        judge("F1 at the natural rate over random directions", over("directions", "f1"), OVER_DIRECTIONS),
        judge(
            f"features with an F1 above {GOOD} that name their state",
            [each["dictionary"]["named"] or 0.0 for each in whole],
            LEAST_NAMED,
        ),
    ]


def section(result: Mapping[str, Any]) -> str:
    """A row for every arm, the mean of the seeds with the least and the largest."""
    lines = [f"| units | {' | '.join(COLUMNS.values())} | failed |", "|---" * (len(COLUMNS) + 2) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["arm"] == arm]
        cells = [ranged([v for row in own if (v := row["scores"][name]) is not None]) for name in COLUMNS]
        lines.append(f"| {arm} | {' | '.join(cells)} | {sum(row['failed'] for row in own)} |")
    return "\n".join(lines) + "\n"
