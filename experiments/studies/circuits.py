"""Circuits from discrete codes, where the truth is planted, and where ablation tells it.

    python -m experiments.study --study=circuits --workdir=runs/circuits --check

Planted: 5 of 32 nodes write other atoms in positive examples than in negative ones, the rest atoms of their own in
both. Without a shift of means every atom comes as often with the opposite sign, so that only codes can tell. The labels
permuted are the control.

Copying: a node is one of 8 groups of value channels of either layer of selective copy
(`configs/synthetic/selective_copy.py:credit_router`). Positive examples are those of the test split; negative ones are
the same tokens in random order, which cannot be copied. True are the nodes whose mean ablation adds most to the loss.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from configs.interp import dictionary as recipe
from configs.synthetic import selective_copy
from experiments.common.config import to_dataclass
from experiments.common.errors import require
from experiments.evaluation.seeds import train_whole
from experiments.studies.protocol import Bar, judge
from experiments.training.experiment import build
from experiments.training.metrics import plain
from experiments.training.optimizers import OptimizerConfig, make_optimizer
from experiments.training.restore import Run, load
from experiments.training.step import StepFunctions, apply, means
from seqboat.interp import circuits
from seqboat.interp.dictionaries import Atoms
from seqboat.interp.edits import Without, at
from seqboat.layers import taps
from seqboat.models import dictionary
from seqboat.models.dictionary import Dictionary, DictionaryConfig

FOLDER = "insight"

# The bars: planted, of the mean over seeds; copying, of the worst seed.
LEAST_UNIQUE = 0.93
LEAST_INFORMATION = 0.97
LEAST_WITHOUT_SHIFT = 0.95  # information
MOST_MEAN_DIFFERENCE = 0.7  # without a shift
MOST_BIAS = 0.15  # of debiased scores' AUC from 0.5, with permuted labels
OVER_MEAN_DIFFERENCE = 0.0  # AUC, copying

NODES, CIRCUIT, WIDTH = 32, 5, 16
SCORES = {"unique": circuits.unique, "information": circuits.information}
COPIED = range(36, 39)  # seeds of selective copy
PERMUTED = 20  # how often the labels are permuted for the control


@dataclasses.dataclass(frozen=True)
class Plan:
    """`examples` of each kind; `model` are differences from the recipe of selective copy, whose ablations are measured
    on `batches` of the test split; the `true` nodes are those that add most to the loss."""

    seeds: Sequence[int]
    copied: Sequence[int]
    examples: int = 10
    size: int = 200
    k: int = 2
    steps: int = 500
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: int = 8
    batches: int = 16
    true: int = 4


def study(
    save: Callable[[dict[str, Any]], None],
    *,
    workdir: Path,
    seeds: range = range(10, 15),
    arms: Sequence[str] = ("planted", "copying"),
) -> list[Bar]:
    """Planted circuits from every seed, and copying from its own. Raises UserError for another arm."""
    require(set(arms) <= {"planted", "copying"}, f"--arms={','.join(arms)}: there are planted, copying")
    return run(Plan(seeds if "planted" in arms else (), COPIED if "copying" in arms else ()), workdir, save)


def run(plan: Plan, directory: Path, save: Callable[[dict[str, Any]], None]) -> list[Bar]:
    """Runs everything, saves after every part, and returns the bars. Raises Stopped if a run is asked to stop."""
    rows: list[dict[str, Any]] = []
    copied: list[dict[str, Any]] = []
    about = {name: plain(value) for name, value in dataclasses.asdict(plan).items() if name != "model"}
    told = lambda: {**about, "planted": rows, "copying": copied, "bars": bars(rows, copied)}
    for seed, shifted in itertools.product(plan.seeds, (True, False)):
        rows.append({"seed": seed, "shifted": shifted, **measure_planted(plan, seed, shifted)})
        save(told())
        print(f"planted, seed {seed}, {'with' if shifted else 'without'} a shift: {rows[-1]['auc']}", flush=True)
    for seed in plan.copied:
        copied.append({"seed": seed, **measure_copying(plan, trained(plan, seed, directory), seed)})
        save(told())
        print(f"copying, seed {seed}: {copied[-1]['auc']}", flush=True)
    return bars(rows, copied)


def bars(rows: Sequence[Mapping[str, Any]], copied: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Every bar that there are rows for."""
    checked: list[Bar] = []
    for shifted, name, bar, at_most in (
        (True, "unique", LEAST_UNIQUE, False),
        (True, "information", LEAST_INFORMATION, False),
        (False, "information", LEAST_WITHOUT_SHIFT, False),
        (False, "mean_difference", MOST_MEAN_DIFFERENCE, True),
    ):
        own = [row["auc"][name] for row in rows if row["shifted"] == shifted]
        if own:
            what = f"planted, {'with' if shifted else 'without'} a shift: mean AUC of {name.replace('_', ' ')}"
            checked.append(judge(what, [float(np.mean(own))], bar, at_most))
    for name in SCORES if rows else ():
        off = abs(float(np.mean([row["permuted"][f"{name}_debiased"] for row in rows])) - 0.5)
        checked.append(judge(f"planted, permuted labels: {name} debiased, from 0.5", [off], MOST_BIAS, at_most=True))
    over = [row["auc"]["information_debiased"] - row["auc"]["mean_difference"] for row in copied]
    if over:
        checked.append(judge("copying: AUC of information over mean difference", over, OVER_MEAN_DIFFERENCE))
    return checked


def section(result: Mapping[str, Any]) -> str:
    """The AUC of every score: planted, in the mean over seeds; and of every seed of copying, with its losses."""
    lines = ["| AUC, planted | with a shift | without | permuted labels |", "|---|---|---|---|"]
    mean = lambda values: f"{np.mean(values):.3f}" if values else ""
    rows = result["planted"]
    for name in rows[0]["auc"] if rows else ():
        cells = [mean([row["auc"][name] for row in rows if row["shifted"] == shifted]) for shifted in (True, False)]
        cells += [mean([row["permuted"][name] for row in rows if name in row["permuted"]])]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    copied = result["copying"]
    if not copied:
        return "\n".join(lines) + "\n"
    table = [(name.replace("_", " "), [f"{row['auc'][name]:.2f}" for row in copied]) for name in copied[0]["auc"]]
    table += [
        ("loss as it is", [f"{row['loss']:.4f}" for row in copied]),
        ("most that one node's ablation adds", [f"{max(row['added']):.2f}" for row in copied]),
        (
            "seconds: codes, ablation",
            [f"{row['seconds']['codes']:.0f}, {row['seconds']['ablation']:.0f}" for row in copied],
        ),
    ]
    heads = [f"seed {row['seed']}" for row in copied]
    lines += ["", f"| AUC, copying | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in table]
    return "\n".join(lines) + "\n"


# A dictionary of given rows.


def fit(x: Array | np.ndarray, config: DictionaryConfig, steps: int = 500, seed: int = 0) -> Atoms:
    """A dictionary of the rows (N, W), with all in every step, by the optimizer of configs/interp/dictionary.py."""
    return _fitting(config, steps)(seed, jnp.asarray(x))


@functools.cache
def _fitting(config: DictionaryConfig, steps: int) -> Callable[[Any, Array], Atoms]:
    optimizer = to_dataclass(OptimizerConfig, recipe.get_config().optimizer.to_dict(), "config.optimizer")

    def loss(output: Any, batch: Mapping[str, Array]) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        error, spread = jnp.square(output.logits - batch["inputs"]).sum(), batch["spread"].sum()
        return error, spread, {"loss": (error, spread)}

    @jax.jit
    def fitted(seed: Any, x: Array) -> Atoms:
        ones, spread = jnp.ones(len(x)), jnp.square(x - x.mean(0, keepdims=True)).sum(1)
        batch: Any = {"inputs": x[:, None], "lengths": ones.astype(int), "weights": ones, "spread": spread}
        make = lambda params: make_optimizer(optimizer, steps, params)
        functions = StepFunctions(Dictionary(config), loss, make, batch)
        step = lambda state, _: (functions.train(state, batch, seed), None)
        state, _ = jax.lax.scan(step, functions.init(seed), length=steps)
        return dictionary.atoms({"params": state.params, "batch_stats": state.batch_stats}, config)

    return fitted


def judged(plan: Plan, x: np.ndarray, positive: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The codes of contributions (N, K, D), and every score of the nodes by them, and by the means."""
    config = DictionaryConfig(width=x.shape[2], target_width=None, size=plan.size, k=plan.k)
    atoms = fit(x.reshape(-1, x.shape[2]), config, plan.steps, seed)
    codes = circuits.node_codes(atoms, jnp.asarray(x))
    return codes, scores(codes, positive, seed) | {"mean_difference": circuits.mean_difference(x, positive)}


def scores(codes: np.ndarray, positive: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Both scores of the nodes, as they are and debiased."""
    key = jax.random.key(seed)
    raw = {name: score(codes, positive) for name, score in SCORES.items()}
    return raw | {f"{name}_debiased": circuits.debiased(score, codes, positive, key) for name, score in SCORES.items()}


# Planted.


def planted(seed: int, shifted: bool, examples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contributions (2 examples, NODES, WIDTH), which examples are positive, and which nodes are of the circuit.

    A node of the circuit has two atoms for positive examples and two others for negative ones, another node one to four
    for both. A contribution is one of them, drawn at random, of a size in 0.5 to 1.5, without a shift of either sign,
    and noise.
    """
    rng = np.random.default_rng((seed, shifted))
    positive, truth = np.arange(2 * examples) < examples, rng.permutation(NODES) < CIRCUIT
    atoms = rng.normal(size=(NODES, 4, WIDTH))
    atoms /= np.linalg.norm(atoms, axis=2, keepdims=True)
    shape = (2 * examples, NODES)
    of_circuit = 2 * positive[:, None] + rng.integers(2, size=shape)
    drawn = np.where(truth, of_circuit, rng.integers(rng.integers(1, 5, NODES), size=shape))
    size = rng.uniform(0.5, 1.5, shape) * (1 if shifted else rng.choice([-1, 1], shape))
    x = size[..., None] * atoms[np.arange(NODES), drawn] + rng.normal(scale=0.1, size=(*shape, WIDTH))
    return x.astype(np.float32), positive, truth


def measure_planted(plan: Plan, seed: int, shifted: bool) -> dict[str, Any]:
    """The AUC of every score, and in the mean over permuted labels."""
    x, positive, truth = planted(seed, shifted, plan.examples)
    codes, found = judged(plan, x, positive, seed)
    rng = np.random.default_rng(seed)
    wrong = [scores(codes, rng.permutation(positive), seed) for _ in range(PERMUTED)]
    chance = {name: float(np.mean([circuits.auc(each[name], truth) for each in wrong])) for name in wrong[0]}
    return {"auc": {name: circuits.auc(score, truth) for name, score in found.items()}, "permuted": chance}


# Copying.


def trained(plan: Plan, seed: int, directory: Path) -> Run:
    """Selective copy from a seed, at its last step."""
    config = selective_copy.get_config("credit_router")
    config.update_from_flattened_dict(dict(plan.model))
    config.seed = seed
    workdir = directory / f"seed_{seed}"
    train_whole(build(config.to_dict()), workdir, workdir.name)
    return load(workdir, config.train.steps)


def reader(run: Run, groups: int) -> Callable[[Any], tuple[Array, Array, Array]]:
    """A function of a batch: the contributions of all nodes (B, layers groups, D), layer by layer; the tap `gated`
    (layers, B, L, E), and where it is computed (layers, B, L)."""
    gau = run.variables["params"]["encoder"]["layers"]["gau"]

    @jax.jit
    def look(batch: Any) -> tuple[Array, Array, Array]:
        _, found = apply(run.model, run.variables, batch, False, ("taps",))
        gated, active, confidence = (taps.read(found["taps"], site) for site in ("gated", "active", "confidence"))
        active, lengths = active[..., 0], jnp.asarray(batch["lengths"])
        weights = jnp.where(active, confidence[..., 0], 0) / jnp.maximum(lengths, 1)[None, :, None]
        added = jax.vmap(functools.partial(circuits.contributions, groups=groups))(
            gated, gau["output"]["kernel"], weights
        )
        return added.swapaxes(0, 1).reshape(len(lengths), -1, added.shape[-1]), gated, active

    return look


def shuffled(batch: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """The batch with the tokens of every sequence, all of which are full, in random order."""
    return {**batch, "inputs": np.random.default_rng(seed).permuted(batch["inputs"], axis=1)}


def ablated_losses(run: Run, groups: int, look: Callable, batches: Sequence[Any]) -> tuple[float, list[float]]:
    """The mean loss as it is, and with the channels of each node at their mean over active elements."""
    layers = run.model.config.encoder.layers
    parts = [jax.device_get(look(batch)[1:]) for batch in batches]
    gated, active = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    centre = [
        values[there].mean(0) if there.any() else values[0, 0] for values, there in zip(gated, active, strict=True)
    ]
    channels = np.arange(2 * gated.shape[-1]).reshape(2, groups, -1)  # of either sign
    evaluate = jax.jit(run.experiment.functions.evaluate)

    def loss(layer: int, which: Array, where: bool = True) -> float:
        edit = at(layer, layers, Without(jnp.asarray(where), signed_channels(centre[layer - 1]), which))
        variables = {**run.variables, "edits": taps.write(run.model, {"gated": edit})}
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), (evaluate(variables, b) for b in batches))
        return float(means(jax.device_get(total))["loss"])

    nodes = itertools.product(range(1, layers + 1), range(groups))
    found = [loss(layer, jnp.asarray(channels[:, group].ravel())) for layer, group in nodes]
    return loss(1, jnp.asarray(channels[:, 0].ravel()), where=False), found


def signed_channels(centre: np.ndarray) -> Atoms:
    """The dictionary whose features are the channels, above and below a centre: without both a channel is there."""
    both, middle = jnp.concatenate([jnp.eye(len(centre)), -jnp.eye(len(centre))]), jnp.asarray(centre)
    return Atoms(both.T, jnp.zeros(len(both)), both, middle, middle, jnp.zeros(()), "relu")


def measure_copying(plan: Plan, run: Run, seed: int) -> dict[str, Any]:
    """The loss that ablating each node adds, every score of the nodes, their AUC, and the seconds of both."""
    batches = list(itertools.islice(run.task.evaluation_batches("test"), plan.batches))
    look = reader(run, plan.groups)
    began = time.monotonic()
    pair = [np.asarray(look(batch)[0])[: plan.examples] for batch in (batches[0], shuffled(batches[0], seed))]
    x = np.concatenate(pair)
    _, found = judged(plan, x, np.arange(len(x)) < len(pair[0]), seed)
    coded = time.monotonic()
    whole, ablated = ablated_losses(run, plan.groups, look, batches)
    seconds = {"codes": coded - began, "ablation": time.monotonic() - coded}
    added = np.array(ablated) - whole
    truth = added.argsort().argsort() >= len(added) - plan.true
    return {
        "loss": whole,
        "added": added.tolist(),
        "scores": {name: score.tolist() for name, score in found.items()},
        "auc": {name: circuits.auc(score, truth) for name, score in found.items()},
        "seconds": seconds,
    }
