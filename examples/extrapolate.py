"""How far a fact is remembered: models trained on short sequences read long ones as streams, at constant memory.

    python -m examples.extrapolate --workdir=runs/induction [--longest=20] [--sequences=16] [--out=FILE]

The work directory is that of a run of the induction task (`experiments/tasks/induction.py`), or of several: of seeds,
of a sweep. For lengths 2^8, 2^10, .. 2^longest: the accuracy at the last token, and how many tokens of a sequence
activated attention, in each layer. --out writes FILE.json, which claims can name (docs/claims.md), and FILE.png.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import experiments
from examples import _fit
from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import user_path, write_json
from experiments.common.pictures import save_picture
from experiments.tasks import induction
from experiments.training.restore import CHECKPOINTS

PIECE = 4096

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of runs of configs/synthetic/induction.py.", required=True
)
_LONGEST = flags.DEFINE_integer("longest", 20, "Logarithm of the longest length.", lower_bound=8, upper_bound=30)
_SEQUENCES = flags.DEFINE_integer("sequences", 16, "Number of sequences per length.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Path of the JSON file and the picture, without suffix.")

Row = dict[str, Any]


def main() -> None:
    out = user_path(_OUT.value, "--out") if _OUT.value else None
    if out is not None:
        _fit.refuse(Path(f"{out}.json"))
    runtime.use_compilation_cache()
    runtime.keep_memory()
    lengths = [2**power for power in range(8, int(_LONGEST.value) + 1, 2)]
    loaded = [(arm, load(directory)) for arm, directory in runs(user_path(str(_WORKDIR.value), "--workdir"))]
    arms: dict[str, list[list[Row]]] = {}
    for arm, run in loaded:
        print(f"{arm}, seed {run.values['seed']}, step {run.step}")
        arms.setdefault(arm, []).append(measure(run, lengths, int(_SEQUENCES.value)))
    if out is not None:
        found = {arm: metrics(rows) for arm, rows in arms.items()}
        seeds = sorted({run.values["seed"] for _, run in loaded})
        write_json(Path(f"{out}.json"), _fit.table(found, seeds, loaded[0][1].values["train"]["steps"]))
        draw(arms, Path(f"{out}.png"))


def runs(workdir: Path) -> list[tuple[str, Path]]:
    """The runs at or below a directory, with the name of each one's arm. Raises UserError if there are none."""
    if (workdir / CHECKPOINTS).is_dir():
        return [(workdir.name, workdir)]
    below = sorted(path.parent for path in workdir.glob(f"**/{CHECKPOINTS}"))
    if not below:
        raise UserError(f"--workdir={workdir}: has no {CHECKPOINTS}, nor has a directory below it")
    return [(path.parent.name, path) for path in below]


def load(directory: Path) -> Any:
    """A trained model. Raises UserError for one of another task, or that cannot read streams."""
    run = experiments.load(directory)
    if not isinstance(run.task, induction.Task):
        raise UserError(f"{directory}: its task is not induction")
    try:
        run.model.initial_state(1)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from error
    return run


def measure(run: Any, lengths: list[int], sequences: int) -> list[Row]:
    """For each length the accuracy, and the mean number of active tokens in each layer; printed as they come."""
    stream = jax.jit(functools.partial(run.model.apply, method="stream"))
    rows = []
    for length in lengths:
        rows.append({"length": length, **read(run, stream, length, sequences)})
        print("  length {length:>9,}  accuracy {accuracy:.3f}  active tokens {active}".format(**rows[-1]), flush=True)
    return rows


def read(run: Any, stream: Any, length: int, sequences: int) -> Row:
    """Of sequences of a length, in pieces."""
    task = induction.Task(induction.Config(length=length, alphabet=run.task.config.alphabet), batch_size=1, seed=0)
    rng = np.random.default_rng(length)
    inputs, targets = map(np.stack, zip(*(task.draw(rng) for _ in range(sequences)), strict=True))
    state, size = run.model.initial_state(sequences), min(PIECE, length)
    active, lengths = 0, jnp.full(sequences, size)
    for begin in range(0, length, size):
        output, state = stream(run.variables, inputs[:, begin : begin + size], lengths, state)
        active = active + np.asarray(output.layers.active).sum(-1)
    right = np.asarray(output.logits[:, -1]).argmax(-1) == targets[:, -1]
    return {"accuracy": float(right.mean()), "active": np.round(active / sequences, 2).tolist()}


def metrics(seeds: list[list[Row]]) -> dict[str, list[float]]:
    """Of an arm: name -> a value per seed. The longest length comes first, since the first is what a claim is about."""
    found = {}
    for rows in reversed(list(zip(*seeds, strict=True))):
        length = rows[0]["length"]
        found[f"accuracy_{length}"] = [row["accuracy"] for row in rows]
        for layer, active in enumerate(zip(*(row["active"] for row in rows), strict=True), 1):
            found[f"active_{layer}_{length}"] = list(active)
    return found


def draw(arms: dict[str, list[list[Row]]], path: Path) -> None:
    """Accuracy, and the number of active tokens in each layer, over lengths: the mean of the seeds, and each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (arm, seeds) in enumerate(arms.items()):
        curve(left, [[(row["length"], row["accuracy"]) for row in rows] for rows in seeds], f"C{number}", "-", arm)
        for layer, style in zip(range(len(seeds[0][0]["active"])), ("-", "--", ":", "-."), strict=False):
            points = [[(row["length"], row["active"][layer]) for row in rows] for rows in seeds]
            curve(right, points, f"C{number}", style, f"{arm}, layer {layer + 1}")
    left.set(xscale="log", xlabel="length of the stream", ylabel="accuracy", ylim=(-0.03, 1.03))
    right.set(xscale="log", yscale="symlog", xlabel="length of the stream", ylabel="active tokens")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    save_picture(figure, path)


def curve(axis: Any, seeds: list[list[tuple[int, float]]], color: str, style: str, label: str) -> None:
    for points in seeds:
        axis.plot(*zip(*points, strict=True), style, color=color, alpha=0.25, linewidth=1)
    lengths = [length for length, _ in seeds[0]]
    mean = [statistics.fmean(value for _, value in points) for points in zip(*seeds, strict=True)]
    axis.plot(lengths, mean, style, color=color, marker="o", markersize=3, label=label)


if __name__ == "__main__":
    cli.run(main)
