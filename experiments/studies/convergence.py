"""Whether two seeds learn the same features, and whether they route alike (Li et al. 2015, arXiv 1511.07543).

    python -m experiments.study --study=convergence --workdir=runs/dictionaries --check

Every pair of seeds of TokFSM, which share one machine, with the runs of the study `dictionaries`: they are trained
unless they are in the work directory. On the same test sequences, per layer: the features of dictionaries of m, and its
channels as the control, matched one to one; and Cohen's kappa of the masks of attention. Further controls: the other
seed's sequences turned by random even offsets, and the same for models that were not trained, which also see the same
inputs.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.evaluation import agreement
from experiments.evaluation.agreement import SITE, Seen
from experiments.studies import dictionaries
from experiments.studies.dictionaries import SPLIT, Plan
from experiments.studies.protocol import Bar, judge
from experiments.training.restore import Run
from seqboat.interp import matching
from seqboat.interp.dictionaries import Atoms

FOLDER = "insight"

# The bars, of every layer in the worst pair of seeds.
OVER_ROLLED = 0.2  # mean correlation of matched features over that with turned sequences
OVER_CHANNELS = 0.03  # over that of matched channels

BATCHES = 16  # of the test split
PENALTY = 0.05  # of a feature's prediction from the other seed's


class Learned(NamedTuple):
    """A run, what it computes, and its dictionaries by layer."""

    run: Run
    seen: Seen
    atoms: Mapping[int, Atoms]


def study(save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(10, 13)) -> list[Bar]:
    """The recipes as they are."""
    return run(Plan(seeds), workdir, save)


def run(plan: Plan, directory: Path, save: Callable[[dict[str, Any]], None]) -> list[Bar]:
    """Compares all pairs, saves after each, and returns the bars. Raises Stopped if a run is asked to stop."""
    rows: list[dict[str, Any]] = []
    load = functools.cache(lambda seed, trained: learned(plan, seed, directory / f"seed_{seed}", trained))
    for pair in itertools.combinations(plan.seeds, 2):
        for layer in plan.layers:
            arms = {
                name: compared(load(pair[0], trained), load(pair[1], trained), layer)
                for name, trained in {"trained": True, "untrained": False}.items()
            }
            rows.append({"seeds": list(pair), "layer": layer, **arms})
            print(f"seeds {pair}, layer {layer}: kappa {arms['trained']['routing']['kappa']:.3f}", flush=True)
        config = load(pair[0], True).run.values
        save({"seeds": list(plan.seeds), "pairs": rows, "bars": bars(rows), "config": config})
    return bars(rows)


def learned(plan: Plan, seed: int, directory: Path, trained: bool) -> Learned:
    """A seed's model and dictionaries, as the study `dictionaries` trains them, on the first BATCHES of a split."""
    model = dictionaries.model(plan, seed, directory, trained)
    size = plan.sites[SITE]
    atoms = {layer: dictionaries.trained_atoms(plan, model, SITE, layer, size) for layer in plan.layers}
    batches = itertools.islice(model.task.evaluation_batches(SPLIT), BATCHES)
    return Learned(model, agreement.see(model, batches), atoms)


def compared(first: Learned, second: Learned, layer: int) -> dict[str, Any]:
    """One layer of two seeds: `features` and `channels` one to one, and their `routing`."""
    m, other_m = (each.seen.m[layer - 1] for each in (first, second))
    active, other_active = (each.seen.active[layer - 1] for each in (first, second))
    f, other_f = encode(first.atoms[layer], m), encode(second.atoms[layer], other_m)
    valid, key = np.ones(active.shape, bool), jax.random.key(layer)  # every sequence is of full length
    found = agreement.matched(f, other_f, valid, key, signed=True)
    sparse = matching.sparse_prediction(f[valid], other_f[valid], PENALTY)
    return {
        "features": {
            **described(found),
            "most_similar": float(matching.semi(found.c).values.mean()),
            "predicted": {"r2": float(sparse.r2.mean()), "from": float((sparse.weights != 0).sum(0).mean())},
        },
        "channels": described(agreement.matched(m, other_m, valid, key, signed=False)),
        "routing": agreement.routing(active, other_active, valid, key),
    }


def encode(atoms: Atoms, m: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(Atoms.encode)(atoms, jnp.asarray(m)))


def described(found: agreement.Matched) -> dict[str, Any]:
    """Without the pairs, which the page on a run has."""
    values = found.values()
    return {name: values[name] for name in ("units", "mean", "rolled")}


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Every bar with its value in the worst pair."""
    checked = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row["trained"] for row in rows if row["layer"] == layer]
        mean = lambda kind, of, own=own: np.array([each[kind][of] for each in own])
        rolled = (mean("features", "mean") - mean("features", "rolled")).tolist()
        channels = (mean("features", "mean") - mean("channels", "mean")).tolist()
        place = f"layer {layer}: correlation of features"
        checked.append(judge(f"{place} over turned sequences", rolled, OVER_ROLLED))
        checked.append(judge(f"{place} over channels", channels, OVER_CHANNELS))
    return checked


def section(result: Mapping[str, Any]) -> str:
    """A row for every measure, with the value of every pair of seeds."""
    rows = result["pairs"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    lines = ["| " + " | ".join(["", *(f"layer {layer}" for layer in layers)]) + " |", "|---" * (1 + len(layers)) + "|"]
    for name, read, digits in MEASURES:
        cells = [" ".join(digits.format(read(row)) for row in rows if row["layer"] == layer) for layer in layers]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    pairs = ", ".join(f"{a} and {b}" for a, b in dict.fromkeys(tuple(row["seeds"]) for row in rows))
    lines += ["", f"Pairs of seeds: {pairs}; a cell has the value of each pair, in this order."]
    return "\n".join(lines) + "\n"


def _reader(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: functools.reduce(lambda found, name: found[name], path, row)


# What a table shows: a name, where it is in a row of a pair, and how it is written.
TRAINED = functools.partial(_reader, "trained")
UNTRAINED = functools.partial(_reader, "untrained")
MEASURES = [
    ("**features**, one to one: mean correlation", TRAINED("features", "mean"), "{:.3f}"),
    ("with turned sequences", TRAINED("features", "rolled"), "{:.3f}"),
    ("models not trained", UNTRAINED("features", "mean"), "{:.3f}"),
    ("each with its most similar, which may be shared", TRAINED("features", "most_similar"), "{:.3f}"),
    ("variance that a few of the other seed predict", TRAINED("features", "predicted", "r2"), "{:.3f}"),
    ("the number of those few, in the mean", TRAINED("features", "predicted", "from"), "{:.1f}"),
    ("**channels**, one to one: mean size of the correlation", TRAINED("channels", "mean"), "{:.3f}"),
    ("with turned sequences", TRAINED("channels", "rolled"), "{:.3f}"),
    ("models not trained", UNTRAINED("channels", "mean"), "{:.3f}"),
    ("**routing**: kappa", TRAINED("routing", "kappa"), "{:+.3f}"),
    ("with turned sequences, least", TRAINED("routing", "rolled", "least"), "{:+.3f}"),
    ("with turned sequences, most", TRAINED("routing", "rolled", "most"), "{:+.3f}"),
    ("models not trained", UNTRAINED("routing", "kappa"), "{:+.3f}"),
    ("share of equal decisions", TRAINED("routing", "same"), "{:.3f}"),
]
