"""Whether quantized latents are of one factor each (Hsu et al. 2023, arXiv 2305.18378).

    python -m experiments.study --study=disentangle --workdir=runs/disentangle --check

Trains autoencoders of short waves of known factors (`configs/interp/factors.py`), plain and quantized, each with and
without weight decay, from every seed, by the loop of `experiments.train`; finished runs in the work directory are
reused. Scores the latents of all waves by `seqboat.interp.infomec`, against an untrained plain autoencoder, and against
themselves with their rows permuted, which tell nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs.interp import factors as recipe
from experiments.evaluation.examples import score
from experiments.evaluation.seeds import train_whole
from experiments.studies.protocol import Bar, judge, ranged
from experiments.tasks.factors import FACTORS
from experiments.training.experiment import build
from experiments.training.metrics import plain
from experiments.training.restore import Run, load
from experiments.training.step import means
from seqboat.interp.infomec import infomec

FOLDER = "insight"
# Of InfoM, in every seed: quantized latents with decay over plain ones with decay.
LEAST_GAIN = 0.05

# Differences from the recipe, which is quantized and has decay.
ARMS: dict[str, dict[str, Any]] = {
    "untrained": {"model.quantized": False, "train.steps": 0},
    "plain": {"model.quantized": False, "optimizer.weight_decay": 0.0},
    "plain_decay": {"model.quantized": False},
    "quantized": {"optimizer.weight_decay": 0.0},
    "quantized_decay": {},
}


def study(
    save: Callable[[dict[str, Any]], None], *, workdir: Path, seeds: range = range(10, 13), steps: int = 5000
) -> list[Bar]:
    """Runs everything, saves after every run, and returns the bars. Raises Stopped if a run is asked to stop."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for arm in ARMS:
            config = configured(arm, seed, steps)
            directory = workdir / f"seed_{seed}" / arm
            train_whole(build(config.to_dict()), directory, f"{arm} of seed {seed}")
            rows.append({"seed": seed, "arm": arm, **measured(load(directory, config.train.steps))})
            save({"seeds": list(seeds), "steps": steps, "arms": ARMS, "rows": rows, "bars": bars(rows)})
            print(f"seed {seed}, {arm}: InfoM {rows[-1]['m']:.3f}, nmse {rows[-1]['nmse']:.4f}", flush=True)
    return bars(rows)


def configured(arm: str, seed: int, steps: int) -> ConfigDict:
    config = recipe.get_config()
    config.seed, config.train.steps = seed, steps
    config.update_from_flattened_dict(ARMS[arm])
    return config


def measured(run: Run) -> dict[str, Any]:
    """A row of the table: scores of the latents of all waves, and of the same with their rows permuted."""
    factors, latents = read(run)
    discrete = run.model.config.quantized
    found, shuffled = (infomec(factors, z, discrete) for z in (latents, np.random.default_rng(0).permutation(latents)))
    scores = lambda scored: {name: getattr(scored, name) for name in ("m", "c", "e")}
    nmse = plain(means(score(run, "test").total)["nmse"])
    arrays = {"nmi": found.nmi.tolist(), "active": found.active.tolist()}
    return {**scores(found), "nmse": nmse, **arrays, "shuffled": scores(shuffled)}


def read(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The factors (N, S) and the latents (N, J) of every sequence of the test split."""
    encode = jax.jit(lambda variables, batch: run.model.apply(variables, batch["inputs"], batch["lengths"]).latents)
    factors, latents = [], []
    for batch in run.task.evaluation_batches("test"):
        real = batch["lengths"] > 0
        factors.append(np.stack(list(run.task.truth(batch).values()), 1)[real])
        latents.append(np.asarray(encode(run.variables, batch))[real])
    return np.concatenate(factors), np.concatenate(latents)


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """None before a seed has both of its arms."""
    of = lambda arm: {row["seed"]: row["m"] for row in rows if row["arm"] == arm}
    quantized, plain = of("quantized_decay"), of("plain_decay")
    gains = [quantized[seed] - plain[seed] for seed in quantized if seed in plain]
    return [judge("InfoM with decay, quantized less plain", gains, LEAST_GAIN)] if gains else []


def section(result: Mapping[str, Any]) -> str:
    """The arms, and which factor the latents of one run tell."""
    lines = [_row("", "InfoM", "chance", "InfoC", "chance", "InfoE", "active", "nmse"), "|" + "---|" * 8]
    for arm in result["arms"]:
        own = [row for row in result["rows"] if row["arm"] == arm]
        chance = lambda name, own=own: f"{fmean(row['shuffled'][name] for row in own):.2f}"
        m, c, e = (ranged([row[name] for row in own]) for name in ("m", "c", "e"))
        active, nmse = ranged([sum(row["active"]) for row in own], 1), ranged([row["nmse"] for row in own], 4)
        lines.append(_row(arm.replace("_", " + "), m, chance("m"), c, chance("c"), e, active, nmse))
    last = result["rows"][-1]
    seeds = ", ".join(map(str, result["seeds"]))
    told = f"Mean of seeds {seeds} (least to largest), {result['steps']:,} steps. Chance: the rows permuted, the mean."
    lines += ["", told, ""]
    lines += [f"The NMI of every factor and latent, {last['arm'].replace('_', ' + ')}, seed {last['seed']}:", ""]
    lines += [_row("", *(f"latent {j}" for j in range(len(last["active"])))), "|" + "---|" * (len(last["active"]) + 1)]
    lines += [_row(name, *(f"{v:.2f}" for v in row)) for name, row in zip(FACTORS, last["nmi"], strict=True)]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
