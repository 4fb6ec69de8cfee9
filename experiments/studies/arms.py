"""Arms of a hypernetwork study under equal conditions: every seed and learning rate of an arm in one program.

    python -m experiments.study --study=rotation

For each arm of configs/hyper/arms.py and each optimiser, with the same grid of learning rates and the same seeds, runs
the steps of `training.step` under `jax.vmap`: twenty runs at once. The learning rate is chosen by validation loss; test
accuracy is that of the last step at this rate.
"""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.hyper.arms import ARMS
from experiments.common.errors import UserError
from experiments.training.experiment import Experiment, build
from experiments.training.metrics import plain
from experiments.training.optimizers import make_optimizer
from experiments.training.step import StepFunctions

RATES = {"sgd": (3e-3, 1e-2, 3e-2, 1e-1), "adam": (3e-4, 1e-3, 3e-3, 1e-2)}
EVALUATION_INTERVAL = 50  # steps between evaluations
TARGET_LOSSES = (0.4, 0.25, 0.2)  # of validation, for the number of steps to reach them


def compare(
    name: str,
    save: Callable[[dict[str, Any]], None],
    *,
    seeds: range = range(5),
    steps: int = 800,
    arms: Sequence[str] = ARMS,
) -> None:
    """Runs the arms of configs/hyper/NAME.py. Raises UserError for an unknown arm."""
    if unknown := set(arms) - set(ARMS):
        raise UserError(
            f"--arms={','.join(arms)}: there is no {', '.join(sorted(unknown))}; choose from {', '.join(ARMS)}"
        )
    get_config = importlib.import_module(f"configs.hyper.{name}").get_config
    found: dict[str, Any] = {}
    for optimizer, rates in RATES.items():
        for arm in arms:
            began = time.monotonic()
            values = get_config(f"{arm},{optimizer}").to_dict()
            values["train"]["steps"] = steps
            told = summary(run(values, rates, seeds), rates)
            own = {"optimizer": optimizer, "arm": arm, "rates": rates, **told, "config": values}
            found[f"{arm} {optimizer}"] = jax.tree.map(plain, own)
            save({"seeds": len(seeds), "arms": found})
            print(
                f"{arm} {optimizer}: {told['loss']} at {told['rate']} in {time.monotonic() - began:.0f} s", flush=True
            )


def run(values: dict[str, Any], rates: tuple[float, ...], seeds: range) -> dict[str, np.ndarray]:
    """Curves of every rate and seed, (R, S, evaluations), and their summary."""
    experiments = [build({**values, "seed": seed}) for seed in seeds]
    first, total = experiments[0], values["train"]["steps"]
    example = {name: np.asarray(array) for name, array in first.task.train_batch(0).items()}

    config = dataclasses.replace(first.config.optimizer, learning_rate=1.0)

    def functions(rate: Any = 1.0):
        """Those of a training step with a learning rate that may be traced."""
        scaled = lambda params: optax.chain(make_optimizer(config, total, params), optax.scale(rate))
        return StepFunctions(first.model, first.task.loss, scaled, example)

    init = functions().init
    # Initialised as a single run of that seed would be.
    states = jax.jit(
        lambda: jax.tree.map(lambda *a: jnp.stack(a), *[init(experiment.seed) for experiment in experiments])
    )()
    states = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rates), *a.shape)), states)
    train_one = lambda rate, state, batch, seed: functions(rate).train(state, batch, seed)
    numbers = jnp.stack([experiment.seed for experiment in experiments])
    train = jax.jit(
        lambda states, batches: jax.vmap(
            lambda rate, row: jax.vmap(functools.partial(train_one, rate))(row, batches, numbers)
        )(jnp.array(rates), states),
        donate_argnums=0,
    )
    evaluate_one = lambda params, batch: _pair(functions().evaluate({"params": params}, batch))
    evaluate = jax.jit(jax.vmap(jax.vmap(evaluate_one, (0, None)), (0, None)))
    variation = jax.jit(jax.vmap(jax.vmap(functools.partial(gradient_variation, first))))

    loaders = [experiment.task.train_batches(0) for experiment in experiments]
    curve, at, variations = [], [], []
    for step in range(1, total + 1):
        if step == 1 or (step - 1) % 200 == 0:
            variations.append(np.asarray(variation(states.params)))
        states = train(states, jax.tree.map(lambda *a: np.stack(a), *[next(loader) for loader in loaders]))
        if step % EVALUATION_INTERVAL == 0 or step == total:
            curve.append(_mean(evaluate, states.params, first, "validation"))
            at.append(step)
    test = _mean(evaluate, states.params, first, "test")
    variations.append(np.asarray(variation(states.params)))
    loss = np.stack([pair[0] for pair in curve], -1)
    # A run whose gradient was not finite stops there; its last loss would look too good.
    bad = np.asarray(states.bad_step) >= 0
    return {
        "steps": np.array(at),
        "loss": np.where(bad[..., None], np.nan, loss),
        "accuracy": np.stack([pair[1] for pair in curve], -1),
        "test": np.where(bad, np.nan, test[1]),
        "variation": np.stack(variations, -1),
    }


def _pair(sums: Any) -> Any:
    return {name: sums[name] for name in ("loss", "accuracy")}


def _mean(evaluate: Any, params: Any, experiment: Experiment, split: str) -> tuple[np.ndarray, np.ndarray]:
    sums = [jax.device_get(evaluate(params, batch)) for batch in experiment.task.evaluation_batches(split)]
    total = jax.tree.map(lambda *a: np.sum(a, axis=0), *sums)
    return total["loss"][0] / total["loss"][1], total["accuracy"][0] / total["accuracy"][1]


def gradient_variation(experiment: Experiment, params: Any) -> Any:
    """Standard deviation over mean of the gradient's norm across the evaluation's hyper-inputs, on one batch."""
    task = experiment.task
    batches = [task.at(task.task.train_batch(0), condition) for condition in task.evaluated()]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)

    def norm(batch):
        loss = lambda params: experiment.functions.objective(params, {}, batch, jax.random.key(0))[0]
        return optax.tree.norm(jax.grad(loss)(params))

    norms = jax.lax.map(norm, stacked)
    return norms.std() / norms.mean()


def summary(runs: dict[str, np.ndarray], rates: tuple[float, ...]) -> dict[str, Any]:
    """An arm's row of the table, at its best learning rate by the median of the last validation loss."""
    last = runs["loss"][:, :, -1]
    medians = np.median(np.where(np.isfinite(last), last, np.inf), axis=1)
    best = int(np.argmin(medians))
    chosen = runs["loss"][best]
    reached = {str(level): [_first(runs["steps"], curve <= level) for curve in chosen] for level in TARGET_LOSSES}
    return {
        "rate": rates[best],
        "loss": _spread(last[best]),
        "losses": last,
        "test_accuracy": runs["test"][best],
        "reached": reached,
        "rates_within_1.5": int(np.sum(medians <= 1.5 * medians[best])),
        "diverged": int(np.sum(~np.isfinite(last) | (last > np.log(10)))),
        "gradient_variation": runs["variation"][best],
        "steps": runs["steps"],
        "curve": np.median(np.where(np.isfinite(chosen), chosen, np.inf), axis=0),
    }


def _spread(values: np.ndarray) -> list[float]:
    """Median, minimum, maximum; infinite if a run diverged."""
    values = np.where(np.isfinite(values), values, np.inf)
    return [float(np.median(values)), float(values.min()), float(values.max())]


def _first(steps: np.ndarray, reached: np.ndarray) -> int | None:
    return int(steps[np.argmax(reached)]) if reached.any() else None
