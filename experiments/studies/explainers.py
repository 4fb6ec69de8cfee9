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
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from experiments.evaluation import agreement, explanations
from experiments.evaluation.agreement import SITE
from experiments.evaluation.explanations import COLUMNS, PREDICATES, SCORES, WIDTH, Halves, Scored
from experiments.studies import dictionaries
from experiments.studies.dictionaries import SPLIT, Plan
from experiments.studies.protocol import Bar, judge, ranged
from experiments.tasks.tokfsm import BASE, FIRST_DIGIT
from experiments.training.restore import Run
from seqboat.interp import scorers
from seqboat.interp.dictionaries import Atoms
from seqboat.interp.explainers import Contexts, split
from seqboat.interp.predicates import Rule

FOLDER = "insight"

# The bars, in the worst seed.
SIMULATION_OVER_CHANNELS = 0.15
F1_OVER_CHANNELS = 0.12  # at the natural rate of activation
OVER_DIRECTIONS = 0.0  # of both
LEAST_NAMED = 0.7  # of features with an F1 above GOOD, those that name a state

GOOD, WELL_SAID = 0.9, 0.8  # F1 of a simulation, of a detection
LAYER, FEATURES_A_TOKEN = 2, 4
BATCHES = 16  # of the test split
UNITS = 100  # of every arm that are explained, drawn from those that fire
LEAST_FIRES = 20  # tokens of the first half
EDITED = 20  # units of every arm that are taken away
SHOWN = 12  # explanations of every arm in the result
PLAN = Plan(range(10, 13), dictionary={"model.k": FEATURES_A_TOKEN}, layers=(LAYER,))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Some test sequences of a run: batches, their halves, m (n, L, D), and true states (n, L) if its task has some."""

    batches: Sequence[Mapping[str, Any]]
    parts: Halves
    m: Float[np.ndarray, "n L D"]
    states: np.ndarray | None = None

    @property
    def first(self) -> Bool[np.ndarray, " n"]:
        return self.parts.first


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
    parts = explanations.halves(Contexts(tokens, model.task.symbol), split(len(tokens), seed))
    return Seen(batches, parts, m, states)


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
    found_words = list(explained(f, units, np.asarray(atoms.decoder), found, seed))
    scored = [each for each, _ in found_words]
    scores: dict[str, float | None] = {name: _mean([read(each) for each in scored]) for name, read in SCORES.items()}
    effects = removed(model, layer, atoms, f, units[:EDITED], found)
    scores["intervention"] = _mean(scorers.intervention(effects)) if len(effects) > 1 else None
    good = [named for each, named in found_words if each.simulation.f1 > GOOD]
    return {
        "units": len(scored),
        "alive": int((f[found.first] > 0).any((0, 1)).sum()),
        "size": f.shape[-1],
        "l0": float((f > 0).sum(-1).mean()),
        "scores": scores,
        "failed": sum(each.failed for each in scored),
        "good": len(good),
        "well_said": float(np.mean([SCORES["detection_f1"](each) > WELL_SAID for each in scored])) if scored else None,
        "said_of_all": float((unselective(f[~found.first][..., units], found.parts.scored.shown) > WELL_SAID).mean()),
        "named": float(np.mean(good)) if good else None,
        "edited": len(effects),
        "examples": [
            {
                "unit": each.unit,
                "text": each.explanation.text,
                "named": named,
                **{name: read(each) for name, read in SCORES.items()},
            }
            for each, named in found_words[:SHOWN]
        ],
    }


def unselective(f: Float[np.ndarray, "n L F"], shown: Bool[np.ndarray, "n L"]) -> Float[np.ndarray, " F"]:
    """The F1 of a detection that says of every window that a unit fires there: 2 p / (1 + p) of its share p."""
    padding = ((0, 0), (0, -shown.shape[1] % WIDTH))
    whole = lambda where: np.pad(where, padding).reshape(len(shown), -1, WIDTH).any(2)
    fires = np.stack([whole(shown & (f[..., unit] > 0)).sum() for unit in range(f.shape[-1])])
    p = fires / max(int(whole(shown).sum()), 1)
    return 2 * p / (1 + p)


def chosen(f: Float[np.ndarray, "n L F"], seed: int) -> list[int]:
    """Up to UNITS units, in random order, of those that fire at LEAST_FIRES tokens or more."""
    possible = np.flatnonzero((f > 0).sum((0, 1)) >= LEAST_FIRES)
    return np.random.default_rng(seed).permutation(possible)[:UNITS].tolist()


def explained(
    f: Float[np.ndarray, "n L F"], units: Sequence[int], decoder: Float[np.ndarray, "F W"], found: Seen, seed: int
) -> Iterator[tuple[Scored, bool]]:
    """Units explained on the first half and scored on the other, and whether the rule names the state, if there is
    one."""
    alive = (f[found.first] > 0).any((0, 1))
    nearest = scorers.nearest(decoder, alive) if units and alive.sum() > 1 else None
    given = ((unit, f[..., unit], None if nearest is None else f[..., nearest[unit]]) for unit in units)
    for each in explanations.explained(PREDICATES, found.parts, given, seed):
        active, rule = f[~found.first, :, each.unit] > 0, each.explanation.rule or Rule()
        yield each, found.states is not None and names_state(rule, active, found.states[~found.first])


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
    """The changes of log-probabilities if a unit is taken away, on two halves of the sequences that it is not explained
    on."""
    other = np.flatnonzero(~found.first)
    batch = jax.tree.map(lambda *arrays: np.concatenate([np.asarray(a) for a in arrays])[other], *found.batches)
    active = np.moveaxis(f[other][..., list(units)] > 0, -1, 0)
    effects = explanations.effects(model, SITE, layer, atoms, units, active, [batch])
    return np.array(list(effects.values())).reshape(-1, 2, model.task.config.vocabulary_size)


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
