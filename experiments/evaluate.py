"""Evaluate a trained run:  python -m experiments.evaluate --workdir=runs/x [--step=N] [--split=test]"""

import json
import os
import time
from pathlib import Path

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.errors import UserError
from experiments.loop import evaluate, hardware, versions
from experiments.reporting import plain
from experiments.restore import load

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's work directory; nothing else is needed.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint: the best one by default.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "test", "The split of the task to evaluate on.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    cli.use_compilation_cache()
    run = load(_WORKDIR.value, _STEP.value, _DATA_DIR.value)
    task, split = run.experiment.task, _SPLIT.value
    batches = task.evaluation_batches(split)
    began = time.monotonic()
    values = evaluate(jax.jit(run.experiment.steps.evaluate), run.variables, batches)
    seconds = time.monotonic() - began
    trivial = task.trivial(split)
    plain_values = {name: plain(value) for name, value in values.items()}
    result = {"step": run.step, "split": split, **plain_values, "trivial": trivial, "seconds": seconds}
    result |= {"config": run.experiment.values, "versions": versions(), "hardware": hardware()}
    path = Path(_WORKDIR.value) / f"evaluation_{split}_{run.step}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)

    table = Table(
        title=f"{run.experiment.values['task']['name']}, {split} split, step {run.step}", title_justify="left"
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name, " ".join(f"{v:.4f}" for v in value) if isinstance(value, list) else f"{value:.4f}")
    for name, value in trivial.items():
        table.add_row(f"{name} of the commonest class", f"{value:.4f}")
    Console().print(table)
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
