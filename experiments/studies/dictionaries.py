"""Dictionaries where the truth is known: of what TokFSM's layers compute, of what attention reads on selective copying
(`copied.py`), and of planted atoms (`planted.py`).

    python -m experiments.study --study=dictionaries --workdir=runs/dictionaries --check

Trains TokFSM (`configs/synthetic/tokfsm.py:credit_router`) and dictionaries of both layers, from every seed, by the
loop of `experiments.train`; finished runs in the work directory are reused. Measures on the test split

    what the reconstruction costs the model (`experiments.evaluation.splicing`)
    how well the best feature tells a state of the machine, the one whose second digit has just been read: its F1, unit
    and threshold chosen on one half of the sequences, measured on the other, in the mean over states

against controls: the channels, of either sign; as many of the largest channels as a row has features; random unit atoms
with their transpose as encoder, and as plain directions; and a dictionary of the untrained model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.interp import dictionary as recipe
from configs.synthetic import tokfsm
from experiments.evaluation import splicing
from experiments.evaluation.examples import score
from experiments.evaluation.seeds import train_whole
from experiments.studies import copied, planted
from experiments.studies.protocol import Bar, judge, ranged
from experiments.training.experiment import build
from experiments.training.metrics import plain
from experiments.training.restore import Run, load
from experiments.training.step import means
from seqboat.interp.dictionaries import Atoms, health, top_k
from seqboat.interp.edits import Splice
from seqboat.models import dictionary

FOLDER = "insight"

# The bars, of every layer and site in the worst seed.
MOST_COST = 0.15  # nats a token that splicing adds
LEAST_TRANSITION = 0.90  # with the splice
OVER_CHANNELS = 0.15  # F1 over that of the best channel
OVER_DIRECTIONS = 0.0  # F1 over that of the best random direction
# Selective copying, the last layer: shares of the strongest feature of `gated` at a query.
LEAST_RIGHT = 0.9  # of the symbol that is asked for
MOST_OTHER = 0.05  # of all others
NORM_CORRELATION = 0.3  # planted atoms, "norm": chosen and true number of features

SPLIT = "test"
# Thresholds are the quantiles of a unit above which these shares of the elements are.
SHARES = tuple(np.geomspace(1e-3, 0.5, 20).tolist())


@dataclasses.dataclass(frozen=True)
class Plan:
    """`model`, `copy` and `dictionary` are differences from the recipes; `sites` has the number of features by site."""

    seeds: Sequence[int]
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dictionary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    copy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sites: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"m": 256, "gated": 512})
    layers: Sequence[int] = (1, 2)
    planted_steps: int = 1000
    planted_arms: Sequence[Mapping[str, Any]] = planted.ARMS


def study(save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(10, 13)) -> list[Bar]:
    """The recipes as they are."""
    return run(Plan(seeds), workdir, save)


def run(plan: Plan, directory: Path, save: Callable[[dict[str, Any]], None]) -> list[Bar]:
    """Runs everything, saves after every part, and returns the bars. Raises Stopped if a run is asked to stop."""
    about = {"seeds": list(plan.seeds), "planted_steps": plan.planted_steps}
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    told = lambda: {**about, "layers": rows, "copied": copies, "planted": found, "bars": bars(rows, copies, found)}
    for seed in plan.seeds:
        models = [model(plan, seed, directory / f"seed_{seed}", trained) for trained in (True, False)]
        about |= {"config": models[0].values}
        whole = effect(models[0])
        for site, size in plan.sites.items():
            for layer in plan.layers:
                pair = [trained_atoms(plan, run, site, layer, size) for run in models]
                rows.append({"seed": seed, "site": site, "layer": layer, **measured(models, pair, site, layer, whole)})
                save(told())
                print(f"seed {seed}, {site} of layer {layer}: {rows[-1]['cost']}", flush=True)
        copy = copied.model(seed, directory / f"seed_{seed}", plan.copy)
        accuracy = {"accuracy": effect(copy)["accuracy"]}
        for layer in plan.layers:
            atoms = trained_atoms(plan, copy, "gated", layer, plan.sites["gated"])
            copies.append({"seed": seed, "layer": layer, **accuracy, **copied.measure(copy, layer, atoms)})
            save(told())
            print(f"seed {seed}, copied, layer {layer}: {copies[-1]['right']}", flush=True)
        for arm in plan.planted_arms:
            found.append(planted.measure(planted.Planted(seed), arm, seed, plan.planted_steps))
            save(told())
    return bars(rows, copies, found)


def bars(
    rows: Sequence[Mapping[str, Any]], copies: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> list[Bar]:
    """Every bar with its value in the worst seed, and whether it is met."""
    checked: list[Bar] = []
    check = lambda *of, **how: checked.append(judge(*of, **how))
    for site, layer in dict.fromkeys((row["site"], row["layer"]) for row in rows):
        own = [row for row in rows if (row["site"], row["layer"]) == (site, layer)]
        over = lambda control, own=own: [row["f1"]["dictionary"] - row["f1"][control] for row in own]
        place = f"{site} of layer {layer}"
        check(f"{place}: loss that a splice adds", [row["cost"] for row in own], MOST_COST, at_most=True)
        check(f"{place}: transition with it", [row["spliced"]["transition"] for row in own], LEAST_TRANSITION)
        check(f"{place}: F1 over channels", over("channels"), OVER_CHANNELS)
        check(f"{place}: F1 over random directions", over("directions"), OVER_DIRECTIONS)
    if last := [row for row in copies if row["layer"] == max(row["layer"] for row in copies)]:
        place = f"copying, gated of layer {last[0]['layer']}"
        check(f"{place}: attribution to the right symbol", [row["right"] for row in last], LEAST_RIGHT)
        check(f"{place}: to other symbols", [row["other"] for row in last], MOST_OTHER, at_most=True)
    if chosen := [row["correlation"] or 0.0 for row in found if row["select"] == "norm"]:
        check("planted, norm: correlation with the true number", chosen, NORM_CORRELATION)
    return checked


def section(result: Mapping[str, Any]) -> str:
    """Three tables: layers and planted atoms, means over seeds with the least and largest values; and copying, the
    values of all seeds, whose layers share the work in ways of their own."""
    over = lambda name: lambda row: row["spliced_controls"][name]["loss"] - row["plain"]["loss"]
    f1 = lambda name: lambda row: row["f1"][name]
    layers = {
        "loss that the splice adds": lambda row: row["cost"],
        "that of as many channels": over("channels"),
        "of random atoms": over("random"),
        "of the mean": lambda row: row["ablated"]["loss"] - row["plain"]["loss"],
        "transition, as it is": lambda row: row["plain"]["transition"],
        "with the splice": lambda row: row["spliced"]["transition"],
        "nmse": lambda row: row["health"]["dictionary"]["nmse"],
        "F1 of the best feature": f1("dictionary"),
        "of the best channel": f1("channels"),
        "of the best random direction": f1("directions"),
        "of the best of as many channels": f1("sparse_channels"),
        "of the best of random atoms": f1("random_atoms"),
        "of a dictionary of the untrained model": f1("untrained"),
    }
    place = lambda row: f"`{row['site']}`, layer {row['layer']}"
    tables = [_table("TokFSM", layers, place, result["layers"], lambda values: ranged(values, 3))]
    if result.get("copied"):
        copies = {
            "accuracy of the model": lambda row: row["accuracy"],
            "queries that attend and have a feature": lambda row: row["queries"],
            "attribution to the symbol that is asked for": lambda row: row["right"],
            "to all other symbols": lambda row: row["other"],
            "queries with more than half at the right one": lambda row: row["most"],
            "attention to it": lambda row: row["attention"],
        }
        by_seed = lambda values: " ".join(f"{value:.3f}" for value in values)
        layer = lambda row: f"`gated`, layer {row['layer']}, by seed"
        tables.append(_table("selective copying", copies, layer, result["copied"], by_seed))
    if result["planted"]:
        names = ("nmse", "l0", "recovered", "correlation")
        lines = ["| planted atoms | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for arm in planted.ARMS:
            own = [row for row in result["planted"] if arm.items() <= row.items()]
            label = " ".join(f"`{value}`" if name == "select" else f"{name} {value:g}" for name, value in arm.items())
            cells = [ranged([row[name] for row in own if row[name] is not None]) for name in names]
            lines += [f"| {' | '.join([label, *cells])} |"] if own else []
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def _table(
    title: str,
    lines: Mapping[str, Callable[[Any], float]],
    place: Callable[[Any], str],
    rows: Sequence[Mapping[str, Any]],
    cell: Callable[[Sequence[float]], str],
) -> str:
    """A column for every place and a line for every number, a cell of the values of all seeds."""
    places = list(dict.fromkeys(map(place, rows)))
    of = lambda read: [cell([read(row) for row in rows if place(row) == each]) for each in places]
    body = [f"| {' | '.join([name, *of(read)])} |" for name, read in lines.items()]
    return "\n".join([f"| {title} | {' | '.join(places)} |", "|---" * (len(places) + 1) + "|", *body])


def model(plan: Plan, seed: int, directory: Path, trained: bool) -> Run:
    """TokFSM from a seed at its last step, or at its first."""
    config = tokfsm.get_config("credit_router")
    config.update_from_flattened_dict(dict(plan.model))
    config.seed = seed
    if not trained:
        config.train.steps = 0
    workdir = directory / ("model" if trained else "untrained")
    train_whole(build(config.to_dict()), workdir, f"{workdir.name} of seed {seed}")
    return load(workdir, config.train.steps)


def trained_atoms(plan: Plan, run: Run, site: str, layer: int, size: int) -> Atoms:
    """The dictionary of a site in a layer of a run, from the run's seed."""
    config, source = recipe.get_config(), Path(run.origin)
    config.update_from_flattened_dict(dict(plan.dictionary))
    config.seed, config.model.size = run.values["seed"], size
    config.task.update(run=str(source), step=run.step, site=site, layer=layer)
    workdir = source.with_name(f"{source.name}_{site}_{layer}")
    train_whole(build(config.to_dict()), workdir, workdir.name)
    found = load(workdir, config.train.steps)
    return dictionary.atoms(found.variables, found.model.config)


def effect(run: Run) -> dict[str, float]:
    """The loss and the selection metric of a split."""
    found = means(score(run, SPLIT).total)
    return {name: plain(found[name]) for name in (run.task.selection_metric, "loss")}


def measured(
    models: Sequence[Run], pair: Sequence[Atoms], site: str, layer: int, whole: Mapping[str, Any]
) -> dict[str, Any]:
    """One layer of the table, from the trained and the untrained model and their dictionaries. `whole` are the metrics
    of the trained one as it is."""
    (run, start), (atoms, early) = models, pair
    x, states, half = read_states(run, site, layer)
    controls = {"channels": largest_channels(x[half], atoms.k), "random": random_atoms(x[half], atoms)}
    spliced = {
        name: effect(splicing.edited(run, site, layer, Splice(True, each)))
        for name, each in {"dictionary": atoms, **controls}.items()
    }
    told = {name: describe(each, x[~half]) for name, each in {"dictionary": atoms, **controls}.items()}
    directions = np.asarray(controls["random"].decoder).T
    encode = lambda atoms, x: np.asarray(jax.jit(atoms.encode)(x))
    units = {
        "dictionary": encode(atoms, x),
        "channels": np.concatenate([x, -x], axis=1),
        "directions": x @ directions,
        "sparse_channels": encode(controls["channels"], x),
        "random_atoms": encode(controls["random"], x),
    }
    f1 = {name: best_f1(values, states, half) for name, values in units.items()}
    other, other_states, other_half = read_states(start, site, layer)
    f1["untrained"] = best_f1(encode(early, other), other_states, other_half)
    told["untrained"] = describe(early, other[~other_half])
    return {
        "cost": spliced["dictionary"]["loss"] - whole["loss"],
        "plain": dict(whole),
        "spliced": spliced["dictionary"],
        "ablated": effect(splicing.ablated(run, SPLIT, site, layer)),
        "spliced_controls": {name: spliced[name] for name in controls},
        "health": told,
        "f1": f1,
    }


def read_states(run: Run, site: str, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values (N, W) of the elements of a split that are the second digit of a state, the state (N,), and whether
    the sequence is of the first half of the batches (N,)."""
    look = jax.jit(splicing.reader(run, site, layer))
    batches = list(run.task.evaluation_batches(SPLIT))
    parts = []
    for number, batch in enumerate(batches):
        value, there = jax.device_get(look(run.variables, batch))
        state = run.task.truth(batch)["state"]
        chosen = there & (state >= 0) & (np.arange(state.shape[1]) % 2 == 0)
        parts.append((value[chosen], state[chosen], np.full(chosen.sum(), number < len(batches) / 2)))
    x, states, half = (np.concatenate(part) for part in zip(*parts, strict=True))
    return x.astype(np.float32), states, half


def largest_channels(x: np.ndarray, k: int) -> Atoms:
    """A dictionary whose features are the k channels of a row that are farthest from their mean."""
    both = jnp.concatenate([jnp.eye(x.shape[1]), -jnp.eye(x.shape[1])])
    mean = jnp.asarray(x.mean(0))
    return Atoms(both.T, jnp.zeros(len(both)), both, mean, mean, jnp.zeros(()), "top_k", k)


def random_atoms(x: np.ndarray, atoms: Atoms) -> Atoms:
    """As many random unit atoms, k a row, that are read by their transpose times the number that fits x best."""
    size, mean = len(atoms.decoder), x.mean(0)
    rows = dictionary.unit(jax.random.normal(jax.random.key(0), (size, x.shape[1])))
    f = jax.jit(functools.partial(top_k, k=atoms.k))(jax.nn.relu((x - mean) @ rows.T))
    scale = ((f @ rows) * (x - mean)).sum() / jnp.square(f @ rows).sum()
    centre = jnp.asarray(mean)
    return Atoms(scale * rows.T, jnp.zeros(size), rows, centre, centre, jnp.zeros(()), "top_k", atoms.k)


def describe(atoms: Atoms, x: np.ndarray) -> dict[str, Any]:
    found = jax.jit(health)(atoms, x)
    return {name: plain(getattr(found, name)) for name in ("nmse", "l0", "dead", "coherence", "deviation")}


def best_f1(values: np.ndarray, states: np.ndarray, half: np.ndarray) -> float:
    """The mean over states of the F1 of "the unit is above the threshold" for "this is the state": unit and threshold
    are the best ones where `half` is True, and F1 is that where it is not.

    `values` (N, U) of N elements, `states` (N,). A state that is missing in a half does not count.
    """
    present = np.intersect1d(states[half], states[~half])
    truth = lambda where: (states[where, None] == present).astype(np.float32)
    chosen, other = values[half], values[~half]
    right = truth(half)
    best = np.full(len(present), -1.0)
    unit, threshold = np.zeros(len(present), int), np.zeros(len(present))
    for level in np.quantile(chosen, 1 - np.array(SHARES), axis=0):
        above = (chosen > level).astype(np.float32)
        found = _f1(right.T @ above, right.sum(0)[:, None], above.sum(0))
        here = found.argmax(1)
        score = found.max(1)
        unit, threshold = np.where(score > best, here, unit), np.where(score > best, level[here], threshold)
        best = np.maximum(score, best)
    above, right = other[:, unit] > threshold, truth(~half)
    return float(_f1((above * right).sum(0), right.sum(0), above.sum(0)).mean())


def _f1(both: np.ndarray, true: np.ndarray, found: np.ndarray) -> np.ndarray:
    return 2 * both / np.maximum(true + found, 1)
