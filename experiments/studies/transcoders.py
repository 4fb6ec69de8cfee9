"""Transcoders where the truth is known, and of a trained network: links from weights, and what a splice costs.

    python -m experiments.study --study=transcoders --workdir=runs/transcoders --check

Planted: a feed-forward network of 4 hidden channels, set by hand, reads sums of planted atoms (`planted.py`); each
channel detects one of the atoms, and writes a direction of its own. A dictionary of the network's input and a
transcoder from its input to its output are trained without knowledge of either. A link is recovered if, of all features
of the dictionary, that of the detected atom has the largest weight <d_i, e_j> into the transcoder's feature that writes
the detector's direction. The control is the same with the dictionary's atoms in random order.

Trained: TokFSM (`configs/synthetic/tokfsm.py:credit_router`) with a feed-forward network of 128 hidden channels in both
layers. Links, constant and error are to sum to the transcoder's pre-activations, and the transcoder in the network's
place is to cost little more than a dictionary of the network's output, of the same size, with as many features a row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs.interp import dictionary as dictionary_recipe
from configs.interp import transcoder as transcoder_recipe
from configs.synthetic import tokfsm
from experiments.common.errors import require
from experiments.evaluation import splicing
from experiments.evaluation.seeds import train_whole
from experiments.studies import planted
from experiments.studies.dictionaries import SPLIT, effect
from experiments.studies.protocol import Bar, judge, ranged
from experiments.tasks.activations import Config
from experiments.training.experiment import build
from experiments.training.metrics import plain
from experiments.training.restore import Run, load
from seqboat.interp.dictionaries import Atoms, health
from seqboat.interp.edits import Edit, Splice, Transcode
from seqboat.interp.paths import paths, pre_activations
from seqboat.layers.feed_forward import FeedForward
from seqboat.models import dictionary
from seqboat.models.dictionary import DictionaryConfig

FOLDER = "insight"

# The bars, in the worst seed; the last two of every layer.
DETECTORS = 4
LEAST_RECOVERED = DETECTORS
MOST_SHUFFLED = 1.0  # links recovered with the atoms in random order, in the mean over orders
MOST_MISSING = 1e-4  # of a pre-activation that its terms do not sum to
MOST_COST = 0.05  # nats a token that the transcoder costs over the dictionary of the output

# What a detector makes of its atom's size: SHARPNESS large makes silu a rectifier, for sizes above THRESHOLD.
SHARPNESS, THRESHOLD = 20.0, 0.3
SHUFFLES = 20
SITE, TARGET = "m", "feed_forward_out"


@dataclasses.dataclass(frozen=True)
class Plan:
    """`size` and `k` are those of planted dictionaries and transcoders; `model`, `dictionary` and `layers` those of
    trained ones, as differences from the recipes."""

    seeds: Sequence[int]
    trained: Sequence[int]
    steps: int = 1000
    size: int = 48
    k: int = 4
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dictionary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Sequence[int] = (1, 2)


def study(
    save: Callable[[dict[str, Any]], None],
    *,
    workdir: Path,
    seeds: range = range(10, 13),
    arms: Sequence[str] = ("planted", "trained"),
) -> list[Bar]:
    """Planted detectors, and TokFSM, from every seed. Raises UserError for another arm."""
    require(set(arms) <= {"planted", "trained"}, f"--arms={','.join(arms)}: there are planted, trained")
    return run(Plan(seeds if "planted" in arms else (), seeds if "trained" in arms else ()), workdir, save)


def run(plan: Plan, directory: Path, save: Callable[[dict[str, Any]], None]) -> list[Bar]:
    """Runs everything, saves after every part, and returns the bars. Raises Stopped if a run is asked to stop."""
    about = dataclasses.asdict(plan) | {name: list(getattr(plan, name)) for name in ("seeds", "trained", "layers")}
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    told = lambda: {"plan": about, "planted": rows, "trained": found, "bars": bars(rows, found)}
    for seed in plan.seeds:
        rows.append({"seed": seed, **measure_planted(plan, seed)})
        save(told())
        print(f"planted, seed {seed}: {rows[-1]['recovered']} of {DETECTORS} links", flush=True)
    for seed in plan.trained:
        model = trained_model(plan, seed, directory / f"seed_{seed}")
        whole = effect(model)
        for layer in plan.layers:
            found.append({"seed": seed, "layer": layer, **measure_trained(plan, model, layer, whole)})
            save(told())
            print(f"seed {seed}, layer {layer}: {found[-1]['cost']}", flush=True)
    return bars(rows, found)


def bars(rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Every bar that there are rows for."""
    checked: list[Bar] = []
    check = lambda *of, **how: checked.append(judge(*of, **how))
    if rows:
        check("planted: links recovered", [row["recovered"] for row in rows], LEAST_RECOVERED)
        check("planted: with shuffled atoms", [row["shuffled"] for row in rows], MOST_SHUFFLED, at_most=True)
        check("planted: missing of a pre-activation", [row["missing"] for row in rows], MOST_MISSING, at_most=True)
    for layer in dict.fromkeys(row["layer"] for row in found):
        own = [row for row in found if row["layer"] == layer]
        place = f"layer {layer}"
        check(f"{place}: missing of a pre-activation", [row["missing"] for row in own], MOST_MISSING, at_most=True)
        check(f"{place}: cost over a dictionary", [row["cost"] for row in own], MOST_COST, at_most=True)
    return checked


def section(result: Mapping[str, Any]) -> str:
    """What is planted and found, by seed; and every layer of the trained network, over seeds."""
    lines = ["| planted, seed | links recovered | with shuffled atoms, mean, most | nmse | features a row |"]
    lines.append("|---" * 5 + "|")
    lines = lines if result["planted"] else []
    for row in result["planted"]:
        told, cells = row["transcoder"], f"{row['recovered']} of {DETECTORS} | {row['shuffled']:.2f}, {row['most']}"
        lines.append(f"| {row['seed']} | {cells} | {told['nmse']:.3f} | {told['l0']:.1f} |")
    if not result["trained"]:
        return "\n".join(lines) + "\n"
    layers = list(dict.fromkeys(row["layer"] for row in result["trained"]))
    own = {layer: [row for row in result["trained"] if row["layer"] == layer] for layer in layers}
    losses = ("plain", "transcoder", "dictionary", "ablated")
    names = ("loss as it is", "with the transcoder", "with a dictionary of the output", "with its mean")
    table = [
        (name, [[row["losses"][loss] for row in own[layer]] for layer in layers])
        for name, loss in zip(names, losses, strict=True)
    ]
    for name, field in (("nmse", "nmse"), ("features a row", "l0")):
        for kind in ("transcoder", "dictionary"):
            table.append((f"{name}, {kind}", [[row[kind][field] for row in own[layer]] for layer in layers]))
    heads = [f"layer {layer}" for layer in layers]
    lines += ["" for _ in lines[:1]] + [
        f"| trained, mean (least to largest) | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    lines += [f"| {name} | {' | '.join(ranged(cell, 3) for cell in cells)} |" for name, cells in table]
    return "\n".join(lines) + "\n"


# Planted.


@dataclasses.dataclass(frozen=True)
class Detecting(planted.Planted):
    """Sums x of planted atoms, and what a network of DETECTORS hidden channels makes of them. Channel k reads atom k:

        y = sum_k silu(s (<x, a_k> - t)) / s  b_k,    s SHARPNESS, t THRESHOLD

    with directions b_k of length 1: an `experiments.tasks.activations.Source`.
    """

    atoms: int = 48
    most: int = 3

    @property
    def config(self) -> Config:
        return dataclasses.replace(super().config, target_width=self.width)

    @property
    def written(self) -> np.ndarray:
        """The directions b (DETECTORS, W)."""
        rows = np.random.default_rng((self.seed, 3)).normal(size=(DETECTORS, self.width))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    @property
    def network(self) -> dict[str, Any]:
        """Parameters of a `FeedForward`."""
        bias = np.full(DETECTORS, -SHARPNESS * THRESHOLD, np.float32)
        up = {"kernel": SHARPNESS * self.directions[:DETECTORS].T, "bias": bias}
        down = {"kernel": self.written / SHARPNESS, "bias": np.zeros(self.width, np.float32)}
        return {"up": up, "down": down}

    def rows(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        x, _ = super().rows(split, first, count)
        return x, np.asarray(_computed(self.network, x))


@jax.jit
def _computed(params: Any, x: Any) -> Any:
    return FeedForward(DETECTORS).apply({"params": params}, x)


def measure_planted(plan: Plan, seed: int) -> dict[str, Any]:
    """How many links are recovered from the weights, how many with the dictionary's atoms in random order, and what is
    missing of the sums on held-out rows."""
    source = Detecting(seed)
    config = DictionaryConfig(width=source.width, target_width=None, size=plan.size, k=plan.k)
    up = planted.fit(source_of(source), config, seed, plan.steps)
    transcoding = dataclasses.replace(config, target_width=source.width, auxiliary=0.0)
    down = planted.fit(source, transcoding, seed, plan.steps)
    links = np.asarray(paths(up, down))
    # By detector, the feature that stands for what it reads, and that for what it writes.
    reading, writing = nearest(source.directions[:DETECTORS], up), nearest(source.written, down)
    rng = np.random.default_rng(seed)
    shuffled = [int(recovered(links[rng.permutation(len(links))], reading, writing)) for _ in range(SHUFFLES)]
    x, y = source.rows("validation", 0, source.config.evaluation_batches)
    return {
        "recovered": int(recovered(links, reading, writing)),
        "shuffled": float(np.mean(shuffled)),
        "most": max(shuffled),
        "missing": missing(up, down, x),
        "dictionary": describe(up, x, x),
        "transcoder": describe(down, x, y),
    }


def source_of(source: Detecting) -> planted.Planted:
    """The same inputs, as their own targets."""
    return planted.Planted(source.seed, source.width, source.atoms, source.most, source.positions)


def nearest(directions: np.ndarray, atoms: Atoms) -> np.ndarray:
    """The feature whose atom has the largest cosine with each of some directions, or -1 if that is below
    `planted.RECOVERED`."""
    cosines = directions @ np.asarray(atoms.decoder).T
    return np.where(cosines.max(1) >= planted.RECOVERED, cosines.argmax(1), -1)


def recovered(links: np.ndarray, reading: np.ndarray, writing: np.ndarray) -> int:
    """How many detectors have their link: the strongest one into the feature that writes is from the one that is
    read."""
    return int(((links[:, writing].argmax(0) == reading) & (reading >= 0) & (writing >= 0)).sum())


# Trained.


def trained_model(plan: Plan, seed: int, directory: Path) -> Run:
    """TokFSM with feed-forward networks from a seed, at its last step."""
    config = tokfsm.get_config("credit_router")
    config.model.feed_forward_size = 128
    config.update_from_flattened_dict(dict(plan.model))
    config.seed = seed
    train_whole(build(config.to_dict()), directory / "model", f"TokFSM of seed {seed}")
    return load(directory / "model", config.train.steps)


def trained_atoms(plan: Plan, run: Run, config: ConfigDict, name: str, layer: int, **task: Any) -> Atoms:
    """A dictionary or transcoder of a layer of a run, from the run's seed."""
    source = Path(run.origin)
    config.model.size = 256
    config.update_from_flattened_dict(dict(plan.dictionary))
    config.seed = run.values["seed"]
    config.task.update(run=str(source), step=run.step, layer=layer, rows="active", **task)
    workdir = source.with_name(f"{source.name}_{name}_{layer}")
    train_whole(build(config.to_dict()), workdir, workdir.name)
    found = load(workdir, config.train.steps)
    return dictionary.atoms(found.variables, found.model.config)


def measure_trained(plan: Plan, run: Run, layer: int, whole: Mapping[str, float]) -> dict[str, Any]:
    """One layer: what is missing of the sums at active elements, and what splices cost. `whole` are the metrics as they
    are."""
    down = trained_atoms(plan, run, transcoder_recipe.get_config(), "transcoder", layer)
    output = trained_atoms(plan, run, dictionary_recipe.get_config(), "output", layer, site=TARGET)
    up = trained_atoms(plan, run, dictionary_recipe.get_config(), "input", layer, site=SITE)
    x, y = active_rows(run, layer)
    edits: dict[str, Edit] = {"transcoder": Transcode(True, down, SITE), "dictionary": Splice(True, output)}
    spliced = {name: effect(splicing.edited(run, TARGET, layer, edit)) for name, edit in edits.items()}
    ablated = effect(splicing.ablated(run, SPLIT, TARGET, layer))
    return {
        "missing": missing(up, down, x),
        "cost": spliced["transcoder"]["loss"] - spliced["dictionary"]["loss"],
        "losses": {name: each["loss"] for name, each in {"plain": whole, **spliced, "ablated": ablated}.items()},
        "transition": {
            name: each.get("transition") for name, each in {"plain": whole, **spliced, "ablated": ablated}.items()
        },
        "transcoder": describe(down, x, y),
        "dictionary": describe(output, y, y),
        "input": describe(up, x, x),
    }


def active_rows(run: Run, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """What the feed-forward network of a layer reads and writes, (N, D), where a split activates it."""
    reads, writes = splicing.reader(run, SITE, layer), splicing.reader(run, TARGET, layer)
    look = jax.jit(lambda variables, batch: (reads(variables, batch)[0], *writes(variables, batch)))
    parts = []
    for batch in run.task.evaluation_batches(SPLIT):
        x, y, there = jax.device_get(look(run.variables, batch))
        parts.append((x[there], y[there]))
    x, y = (np.concatenate(part).astype(np.float32) for part in zip(*parts, strict=True))
    require(len(x) > 0, f"layer {layer} of {run.origin}: no element activates the feed-forward network")
    return x, y


# Both.


def missing(up: Atoms, down: Atoms, x: np.ndarray) -> float:
    """The largest difference, over rows and features, of a pre-activation and the sum of its terms."""

    @jax.jit
    def apart(x: Any) -> Any:
        whole = (x - down.centre[None]) @ down.encoder + down.bias[None]
        return jnp.abs(pre_activations(up, down, x).pre_activation - whole).max()

    return float(apart(x))


def describe(atoms: Atoms, x: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """How well the targets are reconstructed from x."""
    found = jax.jit(health)(atoms, x, targets)
    return {name: plain(getattr(found, name)) for name in ("nmse", "l0", "dead")}
