"""Continual learning: five tasks of digits in sequence, by networks generated from the task's index.

    python -m experiments.study --study=continual

split: task t tells digit 2t from 2t + 1. permuted: all ten digits, with pixels in a task-specific order. The same
target is generated in chunks by an MLP or by an LSTM. While a task is learned, the generated weights of previous tasks
may drift freely, under a penalty, or under a penalty weighted by importance (`seqboat.hyper.continual`).
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks import digits
from experiments.training.metrics import plain
from seqboat import hyper
from seqboat.hyper import continual
from seqboat.models.mlp import MLP, MLPConfig

FOLDER = "hypernetworks"
TASKS, BATCH, RATE = 5, 64, 1e-3
GENERATORS, REGULARISERS = ("chunked", "recurrent"), ("none", "drift", "importance")
# Drift penalties: the best of 0.01, 0.1 and 1 without importance, on seed 100, which is not a seed of the table.
PENALTIES = {"none": 0.0, "drift": 1.0, "importance": 1.0}


def study(save: Callable[[dict[str, Any]], None], *, seeds: range = range(5), steps: int = 500) -> None:
    """Both sequences of tasks and both generators, with and without a penalty on drift."""
    found: dict[str, Any] = {}
    about = {"seeds": len(seeds), "prices": PENALTIES, "steps": steps, "batch": BATCH, "learning_rate": RATE}
    for benchmark in ("split", "permuted"):
        for generator in GENERATORS:
            for regulariser in REGULARISERS:
                began = time.monotonic()
                matrix = np.asarray(run(benchmark, generator, PENALTIES[regulariser], regulariser, seeds, steps))
                own = {"accuracy": matrix, **summary(matrix)}
                found[f"{benchmark} {generator} {regulariser}"] = jax.tree.map(plain, own)
                save({**about, "arms": found})
                print(
                    f"{benchmark} {generator} {regulariser}: {own['last'].mean():.3f}, forgetting "
                    f"{own['forgetting'].mean():.3f}, {time.monotonic() - began:.0f} s",
                    flush=True,
                )


def summary(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """From accuracies (S, after task, of task): the mean over tasks after the last one; when each was just learned; and
    forgetting, the mean over all but the last task of the accuracy when learned minus that at the end."""
    learned = np.diagonal(matrix, axis1=1, axis2=2)
    forgetting = (learned - matrix[:, -1])[:, :-1].mean(1)
    return {"last": matrix[:, -1].mean(1), "learned": learned.mean(1), "forgetting": forgetting}


def make_model(generator: str, classes: int) -> hyper.Hyper:
    target = MLP(MLPConfig(classes=classes, hidden=(64,)))
    leaves = hyper.spec(target, jnp.zeros((1, 1, 64)), jnp.ones(1, jnp.int32))
    encoding = hyper.Encoding("embedding", tasks=TASKS, size=8)
    network = hyper.HyperConfig(encoding=encoding, hidden=(32, 64), head=generator, chunk_size=512)  # type: ignore[arg-type]
    return hyper.Hyper(target, hyper.HyperNetwork(leaves, network))


def run(benchmark: str, generator: str, penalty: float, regulariser: str, seeds: range, steps: int) -> Any:
    """Test accuracies (S, tasks, tasks): after learning each task, on every task."""
    model = make_model(generator, 2 if benchmark == "split" else 10)
    data = [jax.tree.map(jnp.asarray, sequence(benchmark, seed)) for seed in seeds]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *data)
    optimizer = optax.adam(RATE)

    def call(variables: Any, task: Any, x: Any) -> Any:
        out: Any = model.apply(variables, task, x[:, None], jnp.ones(len(x), jnp.int32))
        return out.logits

    inputs = jnp.arange(TASKS)[:, None]

    def cross_entropy(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def learn(variables, task, before, weights, train, key):
        """Trains one task; `before` are the parameters generated for every task, `weights` those of the learned
        tasks."""

        def step(carry, key):
            variables, state = carry
            chosen = jax.random.choice(key, len(train["x"]), (BATCH,))

            def loss(variables):
                own = cross_entropy(call(variables, inputs[task], train["x"][chosen]), train["y"][chosen])
                now = continual.generate_tasks(model, variables, inputs)
                # drift is a mean over all tasks, the formula's over previous tasks, the only ones with nonzero weights.
                return own + penalty * TASKS / jnp.maximum(task, 1) * continual.drift(now, before, weights)

            updates, state = optimizer.update(jax.grad(loss)(variables), state)
            return (optax.apply_updates(variables, updates), state), None

        (variables, _), _ = jax.lax.scan(step, (variables, optimizer.init(variables)), jax.random.split(key, steps))
        return variables

    def accuracy(variables, test):
        of_task = lambda task, x, y: (call(variables, task, x).argmax(-1) == y).mean()
        return jax.vmap(of_task)(inputs, test["x"], test["y"])

    def fisher(variables, task, train):
        """The importance of every generated weight for the task just learned."""
        theta = model.apply(variables, inputs[task], method="generate")

        def loss(theta, example):
            out: Any = model.target.apply({"params": theta}, example["x"][None, None], jnp.ones(1, jnp.int32))
            return cross_entropy(out.logits, example["y"][None])

        gradient = jax.grad(loss)
        return continual.importance(gradient, theta, jax.tree.map(lambda a: a[:100], train))

    def whole(seed, data):
        key = jax.random.key(seed)
        variables: Any = model.init(key, inputs[0], jnp.zeros((1, 1, 64)), jnp.ones(1, jnp.int32))
        nothing = continual.generate_tasks(model, variables, inputs)
        weights = jax.tree.map(jnp.zeros_like, nothing)

        def next_task(carry, task):
            variables, weights = carry
            before = continual.generate_tasks(model, variables, inputs)
            train = jax.tree.map(lambda a: a[task], data["train"])
            variables = learn(variables, task, before, weights, train, jax.random.fold_in(key, task))
            own = jax.tree.map(lambda a: jnp.ones_like(a[0]), weights)
            if regulariser == "importance":
                own = fisher(variables, task, train)
            weights = jax.tree.map(lambda a, w: a.at[task].set(w), weights, own)
            return (variables, weights), accuracy(variables, data["test"])

        return jax.lax.scan(next_task, (variables, weights), jnp.arange(TASKS))[1]

    return jax.jit(jax.vmap(whole))(jnp.array(seeds), stacked)


@functools.cache
def sequence(benchmark: str, seed: int) -> dict[str, Any]:
    """Training and test data of every task, of equal sizes: x (tasks, N, 64), y (tasks, N)."""
    pictures, labels = digits.read()
    rng = np.random.default_rng(seed)
    tasks: dict[str, list[Any]] = {"train": [], "test": []}
    for task in range(TASKS):
        chosen = np.flatnonzero(labels // 2 == task) if benchmark == "split" else np.arange(len(labels))
        order = rng.permutation(64) if benchmark == "permuted" else np.arange(64)
        # The size of the smallest task of `split`: 350, of which 90 are for testing.
        chosen = chosen[: 350 if benchmark == "split" else None]
        count = 90 if benchmark == "split" else 400
        y = labels[chosen] - 2 * task if benchmark == "split" else labels[chosen]
        own = {"x": pictures[chosen][:, order], "y": y}
        tasks["test"].append({name: a[:count] for name, a in own.items()})
        tasks["train"].append({name: a[count:] for name, a in own.items()})
    return {split: jax.tree.map(lambda *a: np.stack(a), *every) for split, every in tasks.items()}
