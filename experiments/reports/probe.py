"""How far gradients reach back in a model, and how signals grow through its layers: `seqboat.analysis` on a real
network and real inputs, at the start of a run or of a trained one, in evaluation mode."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.table import Table

from experiments.common import terminal
from experiments.common.errors import UserError
from experiments.common.pictures import save_picture
from experiments.training.experiment import build
from experiments.training.models import encodes_inputs
from experiments.training.restore import bound, load, middle
from experiments.training.step import Batch
from seqboat import hyper
from seqboat.analysis import depth, reach
from seqboat.models.encoder import Encoder
from seqboat.models.mlp import MLP

KINDS = ("reach", "depth")
# Lags in the table.
LAGS = (1, 10, 100)


class Subject(NamedTuple):
    """A model with its variables, and sequences of its task's first training batch."""

    about: dict[str, Any]
    model: Any
    variables: Mapping[str, Any]
    batch: Batch


def at_start(values: Mapping[str, Any], examples: int) -> Subject:
    """The model of a config with the parameters of its seed. Raises UserError as `build` does."""
    experiment = build(values, one_device=True)
    variables = jax.jit(experiment.functions.variables)(experiment.seed)
    if experiment.config.hypernetwork is not None:
        variables = hyper.bind(experiment.model, variables, jnp.asarray(middle(experiment.task)))
    about = {"config": experiment.values, "step": 0}
    return Subject(about, experiment.network, variables, _first(experiment.task, examples))


def trained(workdir: Path, step: int | None, data_dir: str | None, examples: int) -> Subject:
    """The model of a run, at its best step by default. Raises UserError as `load` does."""
    run = bound(load(workdir, step, data_dir))
    about = {"config": run.values, "step": run.step}
    return Subject(about, run.model, run.variables, _first(run.task, examples))


def _first(task: Any, examples: int) -> Batch:
    batch = task.train_batch(0)
    inputs, lengths = (jnp.asarray(batch[name][:examples]) for name in ("inputs", "lengths"))
    return Batch(inputs=inputs, lengths=lengths)


def measure(subject: Subject, kinds: tuple[str, ...], draws: int, seed: int) -> dict[str, Any]:
    """What OUT.json holds: a group for each kind. Raises UserError for a model that has none of it."""
    found: dict[str, Any] = {"examples": len(subject.batch["inputs"]), "draws": draws, **subject.about}
    key = jax.random.key(seed)
    if "reach" in kinds:
        if not encodes_inputs(subject.model):
            raise UserError(f"--what=reach: a {type(subject.model).__name__} has no sequence to reach back in")
        layers, network = _reach(subject.model, draws, subject.variables, subject.batch, key)
        rows = {f"layer {number}": row for number, row in enumerate(np.asarray(layers), 1)}
        found["reach"] = {name: _of_lags(row) for name, row in (*rows.items(), ("network", np.asarray(network)))}
    if "depth" in kinds:
        if not (encodes_inputs(subject.model) or isinstance(subject.model, MLP)):
            raise UserError(f"--what=depth: a {type(subject.model).__name__} has no stack of layers to follow")
        grown = jax.device_get(_depth(subject.model, subject.variables, subject.batch, key))
        widths = _widths(subject.model)
        found["depth"] = {**{name: values.tolist() for name, values in grown._asdict().items()}, **widths}
    return found


def _of_lags(row: np.ndarray) -> dict[str, Any]:
    return {"slope": reach.slope(row), "horizon": reach.horizon(row), "r": row.astype(float).tolist()}


def _widths(model: Any) -> dict[str, int]:
    if isinstance(model, MLP):
        return {"layers": len(model.config.hidden), "width": min(model.config.hidden)}
    return {"layers": model.config.encoder.layers, "width": model.config.encoder.layer.features}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reach(model: Any, draws: int, variables: Mapping[str, Any], batch: Batch, key: Array) -> tuple[Array, Array]:
    """r(tau) of every layer and of the encoder."""
    x, valid = _given_to_the_encoder(model, variables, batch)
    config, lengths = model.config.encoder, valid.sum(1)
    run, own = _encoder(config, variables, valid), _collections(variables)
    resid = jnp.stack(run(x)[1])
    directions = jax.random.normal(key, (draws, x.shape[-1]))
    block = config.layer.block()(config.layer, parent=None)
    rate = own.get("batch_stats", {}).get("rate", {}).get("threshold")

    def one(layer: tuple[Any, Array]) -> Array:
        advance = lambda x: block.apply(layer[0], x, valid, False, None, rate, method="advance")[0]
        return reach.reach(advance, layer[1], lengths, directions)

    stacked = {name: tree["layers"] for name, tree in own.items() if "layers" in tree}
    inputs = jnp.concatenate([x[None].astype(resid.dtype), resid[:-1]])
    return jax.lax.map(one, (stacked, inputs)), reach.reach(lambda x: run(x)[0], x, lengths, directions)


@functools.partial(jax.jit, static_argnums=0)
def _depth(model: Any, variables: Mapping[str, Any], batch: Batch, key: Array) -> depth.Growth:
    if isinstance(model, MLP):
        return depth.growth(*_hidden(model, variables, batch), key)
    x, valid = _given_to_the_encoder(model, variables, batch)
    run = _encoder(model.config.encoder, variables, valid)
    return depth.growth(lambda x: run(x)[1], x, valid, key)


def _hidden(model: MLP, variables: Mapping[str, Any], batch: Batch) -> tuple[Callable, Array, Array]:
    """What is added up before every activation, of an MLP's inputs."""
    x = jnp.asarray(batch["inputs"])
    x = x.reshape(len(x), -1)

    def states(x: Array) -> list[Array]:
        named = lambda module, _: (module.name or "").startswith("hidden_")
        _, found = model.apply(variables, x[..., None], batch["lengths"], capture_intermediates=named, mutable=True)
        layers = range(len(model.config.hidden))
        return [found["intermediates"][f"hidden_{number}"]["__call__"][0] for number in layers]

    return states, x, jnp.ones(len(x), bool)


def _given_to_the_encoder(model: Any, variables: Mapping[str, Any], batch: Batch) -> tuple[Array, Array]:
    """x (B, L, D) and valid (B, L), whatever a model makes of its inputs before."""
    found: list[tuple[Array, Array]] = []

    def look(method: Callable, arguments: tuple, named: dict, context: Any) -> Any:
        if isinstance(context.module, Encoder) and context.method_name == "advance":
            found.append((arguments[0], arguments[1]))
        return method(*arguments, **named)

    with nn.intercept_methods(look):
        model.apply(variables, batch["inputs"], batch["lengths"])
    return found[0]


def _encoder(config: Any, variables: Mapping[str, Any], valid: Array) -> Callable:
    """x (B, L, D) -> the encoder's output, and those of its layers."""
    encoder, own = Encoder(config, parent=None), _collections(variables)

    def run(x: Array) -> tuple[Array, list[Array]]:
        (y, _), found = encoder.apply(own, x, valid, mutable=["taps"])
        return y, list(found["taps"]["layers"]["resid"])

    return run


def _collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}


def show(found: Mapping[str, Any]) -> None:
    """Prints a table for every kind."""
    console = terminal.console()
    if "reach" in found:
        titles = [f"r at lag {lag}" for lag in LAGS]
        table = _table("how far gradients reach back", "", "slope of ln r per token", *titles, "last lag above 1 %")
        for name, row in found["reach"].items():
            values = [f"{row['r'][lag]:.2g}" if lag < len(row["r"]) else "-" for lag in LAGS]
            table.add_row(name, _number(row["slope"], "+.3f"), *values, str(row["horizon"]))
        console.print(table)
    if "depth" in found:
        of = found["depth"]
        table = _table(
            f"how signals grow: {of['layers']} layers of width {of['width']}, L/n {of['layers'] / of['width']:.3g}",
            "",
            "mean square",
            "growth of a small difference",
        )
        for number, square in enumerate(of["mean_square"]):
            grown = _number(of["growth"][number - 1], ".4g") if number else ""
            table.add_row(f"layer {number}" if number else "input", f"{square:.4g}", grown)
        console.print(table)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Writes the picture: r over the lags, and the mean square and growth of every layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [kind for kind in KINDS if kind in found]
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 3.6), constrained_layout=True, squeeze=False)
    for kind, axis in zip(kinds, axes[0], strict=True):
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if kind == "reach":
            for name, row in found["reach"].items():
                # A logarithm has no place for 0.
                axis.plot([value or None for value in row["r"]], label=name, linewidth=2 if name == "network" else 1)
            axis.set(xlabel="lag in tokens", ylabel="r", title="gradient of the last token's output")
        else:
            of = found["depth"]
            axis.plot(of["mean_square"], marker="o", markersize=3, label="mean square")
            axis.plot(range(1, len(of["growth"]) + 1), of["growth"], marker="o", markersize=3, label="growth")
            axis.set(xlabel="layer", title="signals, and small differences of them")
        axis.legend(fontsize=7)
    save_picture(figure, path)
