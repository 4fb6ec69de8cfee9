"""What the examples share: the one loop, and the command line.

    python -m examples.NAME [--seeds=5] [--out=FILE]

An example measures its arms from every seed, `run(seeds, steps) -> {arm: {metric: a value per seed}}`. The command
prints a row for each arm, and writes them with the command, the seeds, the hardware and the versions.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

from experiments.common import cli, runtime
from experiments.common.errors import require
from experiments.common.files import refuse_unwritable, user_path, write_json
from experiments.common.provenance import command, hardware, versions
from experiments.common.spread import spread

Found = dict[str, dict[str, Any]]  # arm -> metric -> a value per seed


def fit(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[Any, jax.Array]:
    """`steps` steps of `optimizer` on loss(params, batch(step)): the parameters and the loss of each step. A scan, so
    that `jax.vmap` trains several seeds in one program."""

    def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch(index))
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    return params, losses


def main(run: Callable[[range, int], Found], steps: int) -> None:
    """The command line of an example that takes `steps` training steps."""
    seeds = flags.DEFINE_integer("seeds", 5, "Number of seeds, from 0.", lower_bound=1)
    out = flags.DEFINE_string("out", None, "JSON file of the result.")

    def measure() -> None:
        path = user_path(out.value, "--out") if out.value is not None else None
        if path is not None:
            refuse(path)
        runtime.use_compilation_cache()
        of = range(int(seeds.value or 1))
        made = table(run(of, steps), of, steps)
        for arm, row in made.items():
            print(f"{arm:<20}", *(f"{name} {shown(summary)}" for name, summary in row["metrics"].items()), sep="  ")
        if path is not None:
            write_json(path, made)

    cli.run(measure)


def refuse(path: Path) -> None:
    """Raises UserError for a file that cannot be written, before anything is computed."""
    require(not path.is_dir(), f"--out={path}: is a directory; name a file")
    refuse_unwritable(path.parent)


def over_seeds(values: Any) -> dict[str, Any]:
    """The values and their spread; None for those that are not finite."""
    column = [float(value) if math.isfinite(value) else None for value in values]
    return {"values": column, **spread(column)}


def shown(summary: dict[str, Any]) -> str:
    """Mean and standard error."""
    mean, error = summary["mean"], summary["standard_error"]
    return ("-" if mean is None else f"{mean:.3f}") + ("" if error is None else f" ± {error:.3f}")


def table(found: Found, seeds: Iterable[int], steps: int) -> dict[str, Any]:
    """The file that docs/claims.md is made from: the first metric of an arm is its selection metric."""
    about = {"command": command(), "versions": versions(), "hardware": hardware()}
    about |= {"seeds": list(seeds), "config": {"train": {"steps": steps}}}
    rows = {}
    for arm, metrics in found.items():
        summaries = {name: over_seeds(values) for name, values in metrics.items()}
        rows[arm] = {**about, "metrics": summaries, "test": [{"selection_metric": next(iter(metrics))}]}
    return rows
