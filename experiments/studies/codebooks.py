"""Codebooks where the truth is known: codes of TokFSM's m name states, and forced codes change what comes next.

    python -m experiments.study --study=codebooks --workdir=runs/codebooks --check

Trains TokFSM (`configs/synthetic/tokfsm.py:credit_router`) and, from its parameters and k-means of its own values,
codebooks at m of both layers (`:credit_router,codebook`); finished runs in the work directory are reused. Measures on
the test split what the codes cost, how precise the best code of a state is, the one whose second digit has just been
read, beside the best channel of either sign at equal recall, and what forcing does: at one position of a sequence the
model takes the codes that are typical of another state. The next digit's distribution is compared with those of both
states' successors, by the Jensen-Shannon divergence. A control forces the codes of a third state.

Codes, channels, thresholds and typical codes are chosen on one half of the sequences, and measured on the other.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.synthetic import tokfsm
from experiments.evaluation.examples import score
from experiments.evaluation.seeds import train_whole
from experiments.studies.protocol import Bar, judge
from experiments.tasks.tokfsm import BASE, FIRST_DIGIT
from experiments.training.experiment import build
from experiments.training.metrics import plain
from experiments.training.restore import Run, bound, load
from experiments.training.step import means
from seqboat.interp.codebooks import Codebook, nearest
from seqboat.layers import taps
from seqboat.models.bottlenecked import force

FOLDER = "insight"

# The bars, in the worst seed.
MOST_COST = 0.03  # of transition
LEAST_PRECISION = 0.97  # of a state's best code, in the mean over states
OVER_CHANNELS = 0.0  # precision over that of the best channel
LEAST_NEARER = 0.80  # of distributions that forced codes bring nearer to the other state's than to the own
MOST_DIVERGENCE = 0.5  # from the other state's after forcing, over that before

SPLIT = "test"


@dataclasses.dataclass(frozen=True)
class Plan:
    """`model` and `codes` are differences from the recipes."""

    seeds: Sequence[int]
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    codes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def study(save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(10, 13)) -> list[Bar]:
    """The recipes as they are."""
    return run(Plan(seeds), workdir, save)


def run(plan: Plan, directory: Path, save: Callable[[dict[str, Any]], None]) -> list[Bar]:
    """Runs everything, saves after every seed, and returns the bars. Raises Stopped if a run is asked to stop."""
    rows: list[dict[str, Any]] = []
    for seed in plan.seeds:
        base, codes = models(plan, seed, directory / f"seed_{seed}")
        rows.append({"seed": seed, **measured(base, codes, seed)})
        save({"seeds": list(plan.seeds), "config": codes.values, "rows": rows, "bars": bars(rows)})
        print(f"seed {seed}: {rows[-1]['transition']}", flush=True)
    return bars(rows)


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Every bar with its value in the worst seed, and whether it is met."""
    costs = [row["transition"]["plain"] - row["transition"]["codes"] for row in rows]
    checked = [judge("transition that codes cost", costs, MOST_COST, at_most=True)]
    for layer in range(len(rows[0]["layers"])):
        own = [row["layers"][layer] for row in rows]
        place = f"layer {layer + 1}"
        precise = [each["precision"] for each in own]
        checked.append(judge(f"{place}: precision of a state's code", precise, LEAST_PRECISION))
        over = [each["precision"] - each["channel_precision"] for each in own]
        checked.append(judge(f"{place}: that over channels", over, OVER_CHANNELS))
    forced = [row["forced"]["both"] for row in rows]
    checked.append(judge("forced in both layers: nearer", [each["nearer"] for each in forced], LEAST_NEARER))
    shares = [each["to_other"] / each["before"] for each in forced]
    checked.append(judge("forced in both layers: divergence left", shares, MOST_DIVERGENCE, at_most=True))
    return checked


def section(result: Mapping[str, Any]) -> str:
    """A row for every measure, a column for every seed."""
    rows = result["rows"]
    of = lambda layer, name: [row["layers"][layer][name] for row in rows]
    table = [
        ("transition, plain", [row["transition"]["plain"] for row in rows]),
        ("transition, codes", [row["transition"]["codes"] for row in rows]),
    ]
    for layer in range(len(rows[0]["layers"])):
        for name in ("precision", "channel_precision", "recall", "information", "codes_in_use", "codes_per_state"):
            table.append((f"layer {layer + 1}: {name.replace('_', ' ')}", of(layer, name)))
    for how in rows[0]["forced"]:
        for name in ("nearer", "to_other", "to_own", "before"):
            numbers = [row["forced"][how][name] for row in rows]
            table.append((f"forced, {how.replace('_', ' ')}: {name.replace('_', ' ')}", numbers))
    shown = lambda value: str(value) if isinstance(value, int) else f"{value:.3f}"
    head = ["| | " + " | ".join(f"seed {row['seed']}" for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    body = [f"| {name} | " + " | ".join(map(shown, values)) + " |" for name, values in table]
    return "\n".join([*head, *body]) + "\n"


def models(plan: Plan, seed: int, directory: Path) -> tuple[Run, Run]:
    """TokFSM from a seed, and the run with codebooks that starts from it, at their last steps."""
    found: list[Run] = []
    for name, variant, changes in (
        ("model", "credit_router", plan.model),
        ("codes", "credit_router,codebook", {**plan.model, **plan.codes}),
    ):
        config = tokfsm.get_config(variant)
        config.update_from_flattened_dict(dict(changes))
        config.seed = seed
        workdir = directory / name
        train_whole(build(config.to_dict()), workdir, f"{name} of seed {seed}", found[0].origin if found else None)
        found.append(load(workdir, config.train.steps))
    return found[0], found[1]


def measured(base: Run, codes: Run, seed: int) -> dict[str, Any]:
    """One row of the table, from the plain run and the one with codebooks."""
    scores = {name: means(score(each, SPLIT).total) for name, each in (("plain", base), ("codes", codes))}
    names = ("transition", "loss")
    whole = {metric: {name: plain(found[metric]) for name, found in scores.items()} for metric in names}
    run = bound(codes)
    book = taps.written(run.variables["edits"])["m"]
    seen = read(run, book)
    layers = [of_layer(seen, layer) for layer in range(len(book.table))]
    typical = np.stack([layer.pop("typical") for layer in layers])
    return {**whole, "layers": layers, "forced": forced(run, typical, seed)}


@dataclasses.dataclass(frozen=True)
class Seen:
    """Of the N elements that are the second digit of a state: the state (N,), whether the sequence is of the first half
    of the batches (N,), and in every layer m (layers, N, W) and its code (layers, N)."""

    states: np.ndarray
    half: np.ndarray
    m: np.ndarray
    codes: np.ndarray
    count: int


def read(run: Run, book: Codebook) -> Seen:
    """Everything in one pass over the split."""
    examine = run.experiment.functions.evaluate_examples

    @jax.jit
    def look(variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        m = taps.read(examine(variables, batch, tapped=True).taps, "m")
        return m, jax.vmap(lambda m, table: nearest(m, table)[..., 0, 0])(m, book.table)

    batches, parts = list(run.task.evaluation_batches(SPLIT)), []
    for number, batch in enumerate(batches):
        m, codes = jax.device_get(look(run.variables, batch))
        state = run.task.truth(batch)["state"]
        chosen = finished(batch, state)
        parts.append((state[chosen], np.full(chosen.sum(), number < len(batches) / 2), m[:, chosen], codes[:, chosen]))
    states, half, m, codes = zip(*parts, strict=True)
    join = lambda arrays: np.concatenate(arrays, axis=1)
    return Seen(np.concatenate(states), np.concatenate(half), join(m), join(codes), book.table.shape[2])


def finished(batch: Mapping[str, Any], state: np.ndarray) -> np.ndarray:
    """Where a state's second digit has just been read, (B, L)."""
    position = np.arange(state.shape[1])[None]
    return (state >= 0) & (position % 2 == 0) & (position < np.asarray(batch["lengths"])[:, None])


def of_layer(seen: Seen, layer: int) -> dict[str, Any]:
    """One layer's codes and states; `typical` (states,) is the most frequent code of every state."""
    codes, m, half, states = seen.codes[layer], seen.m[layer], seen.half, seen.states
    number = int(states.max()) + 1
    table = [np.zeros((seen.count, number)) for _ in range(2)]
    for side, part in enumerate((half, ~half)):
        np.add.at(table[side], (codes[part], states[part]), 1)
    typical = table[0].argmax(0)
    own = table[1][typical, np.arange(number)]
    recall = table[0].max(0) / np.maximum(table[0].sum(0), 1)
    joint = table[0] + table[1]
    return {
        "precision": float(np.mean(own / np.maximum(table[1][typical].sum(1), 1))),
        "recall": float(np.mean(own / np.maximum(table[1].sum(0), 1))),
        "channel_precision": float(np.mean([channel(m, states == s, half, recall[s]) for s in range(number)])),
        "information": information(joint) / entropy(joint.sum(0)),
        "codes_in_use": int((joint.sum(1) > 0).sum()),
        "codes_per_state": float((joint > 0).sum(0).mean()),
        "typical": typical,
    }


def channel(m: np.ndarray, own: np.ndarray, half: np.ndarray, recall: float) -> float:
    """The precision of the channel, of either sign, that tells a state best with a threshold of this recall."""
    x = np.concatenate([m, -m], axis=1)
    here, there = half, ~half
    threshold = np.quantile(x[here & own], 1 - recall, axis=0)
    precision = lambda part: (x[part & own] >= threshold).sum(0) / np.maximum((x[part] >= threshold).sum(0), 1)
    return float(precision(there)[precision(here).argmax()])


def information(joint: np.ndarray) -> float:
    """Mutual information, in nats, of the rows and columns of a table of counts."""
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.reshape(-1))


def entropy(counts: np.ndarray) -> float:
    """In nats, of counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def forced(run: Run, typical: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """What the next digit's distribution becomes where one position of every sequence of the second half takes the
    codes (layers, states) of another state: in `both` layers, in one, and in both those of a `third` state.

    `nearer` is the share of distributions that are nearer to those after the other state than to those after the own;
    `to_other` and `to_own` are mean Jensen-Shannon divergences after, `before` that to the other state's before.
    """
    layers = range(1, len(typical) + 1)
    rng, batches = np.random.default_rng(seed), list(run.task.evaluation_batches(SPLIT))
    follow = successors(run.task.successors)
    apply = jax.jit(lambda variables, batch: run.model.apply(variables, batch["inputs"], batch["lengths"]).logits)
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches[(len(batches) + 1) // 2 :]:
        state = run.task.truth(batch)["state"]
        rows = np.arange(len(state))
        place = np.array([rng.choice(np.flatnonzero(each)) for each in finished(batch, state)])
        own = state[rows, place]
        other, third = (differing(rng, own, follow) for _ in range(2))
        where = np.zeros(state.shape, bool)
        where[rows, place] = True
        plan = {"both": (layers, other), "third": (layers, third), **{f"layer_{n}": ((n,), other) for n in layers}}
        before = digits(apply(run.variables, batch), rows, place)
        for name, (chosen, target) in plan.items():
            ids = {
                n: np.broadcast_to(typical[n - 1][target][:, None, None, None], (*state.shape, 1, 1)) for n in chosen
            }
            after = digits(apply(force(run.model, run.variables, "m", ids, where), batch), rows, place)
            apart = [divergence(p, follow[q]) for p, q in ((after, other), (after, own), (before, other))]
            found.setdefault(name, []).append(np.stack([apart[0] < apart[1], *apart]))
    names = ("nearer", "to_other", "to_own", "before")
    mean = lambda each: np.concatenate(each, axis=1).mean(1).tolist()
    return {how: dict(zip(names, mean(each), strict=True)) for how, each in found.items()}


def differing(rng: np.random.Generator, own: np.ndarray, follow: np.ndarray) -> np.ndarray:
    """For every state another one, after which other digits may follow."""
    apart = np.abs(follow[own][:, None] - follow[None]).sum(-1) > 0
    return np.array([rng.choice(np.flatnonzero(each)) for each in apart])


def successors(edges: np.ndarray) -> np.ndarray:
    """The true distribution of the digit that follows every state, (states, 10)."""
    return np.stack([np.bincount(row // BASE, minlength=BASE) / len(row) for row in edges])


def digits(logits: Any, rows: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The distribution of the next digit at one position of every sequence, (B, 10)."""
    return np.asarray(jax.nn.softmax(jnp.asarray(logits)[rows, place, FIRST_DIGIT:], axis=-1), np.float64)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The Jensen-Shannon divergence of rows of distributions, in nats."""
    middle = (p + q) / 2
    terms = lambda a: np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / np.where(middle > 0, middle, 1)), 0).sum(-1)
    return (terms(p) + terms(q)) / 2
