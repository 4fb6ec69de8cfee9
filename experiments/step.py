"""One training step and one evaluation step: pure functions of a state and a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from seqboat.layers.router import ActivationStats
from seqboat.layers.streaming import reset
from seqboat.parallel.rules import ALONE, Layout

# Folded into the seed for initial parameters; steps fold in their own, smaller numbers.
INITIALISATION = 2**32 - 1

# name -> (sum, weight): means are taken at the very end, and so are exact over batches of any size.
Sums = dict[str, tuple[Any, Any]]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on: after `step` updates.

    `metrics` are sums since they were last reported. `bad_step` is the first step whose loss, gradient or result was
    not finite, or -1: from it on nothing changes any more, so the state stays the last good one. `streams`: what the
    model remembers of the streams that the rows of batches are, {} where they are none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    metrics: Sums
    bad_step: jax.Array
    streams: Any


@dataclasses.dataclass(frozen=True)
class Split:
    """A step split over devices: `model` computes a device's part, on a `mesh`, or under pmap if that is None."""

    model: nn.Module
    layout: Layout
    mesh: jax.sharding.Mesh | None

    def on_devices(self, fn, params, batch, gradient: bool = True):
        """`fn(params, batch_stats, batch, key)` on every device's parts. Its result ends with the streams; with
        `gradient` it begins with one."""
        fn = functools.partial(fn, model=self.model, layout=self.layout)
        if self.mesh is None:
            return fn
        whole, specs = PartitionSpec(), self.layout.of_parameters(params)
        given = (specs, whole, self.layout.of_batch(batch), whole)
        results = (specs, whole, whole, self.layout.per_sequence) if gradient else (whole, self.layout.per_sequence)
        return jax.shard_map(fn, mesh=self.mesh, in_specs=given, out_specs=results, check_vma=False)


class Examined(NamedTuple):
    """A batch looked at closely: `total` is what `evaluate` returns, `examples` are the metrics of the loss as pairs of
    (B,); the model's `output`, its `taps` (`seqboat.layers.taps`) if they were asked for, and its `streams` after the
    batch if that had some."""

    total: Sums
    examples: Sums
    output: Any
    taps: Any
    streams: Any


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """`init(seed)`, `train(state, batch)`, `evaluate(variables, batch)`; `read(variables, batch)`, which returns the
    streams after the batch too; the `objective` for diagnosis; on one device `examine(variables, batch,
    tapped=False)`."""

    init: Callable[[int], TrainState]
    train: Callable[[TrainState, Any], TrainState]
    evaluate: Callable[[Any, Any], Sums]
    read: Callable[[Any, Any], tuple[Sums, Any]]
    objective: Callable[..., Any]
    examine: Callable[..., Examined]


def make_steps(
    model: nn.Module,
    loss: Callable[[Any, Any], tuple[Any, Any, Sums]],
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    example: dict[str, Any],
    *,
    seed: int,
    accumulate: int = 1,
    activation_price: float = 0.0,
    streams: int = 0,
    evaluation_metrics: Callable[[Any, Any], Sums] = lambda output, batch: {},
    split: Split | None = None,
) -> StepFunctions:
    """Steps of a model under a task's loss.

    The gradient is of  sum of losses / sum of weights + activation_price * mean probability of activating,  the same
    for any `accumulate`, the number of parts a batch is computed in. Dropout of a step draws from (seed, step).
    `example` is a process's batch, for shapes. `evaluation_metrics` are those that evaluation reports besides the
    loss's own. With `streams` the rows of batches, of all processes together, are so many streams, which `begins` (B,)
    empties, and training is truncated backpropagation: values go from a batch to the next, gradients do not. A batch
    that has `streams`, a state, is read from it on.
    With `split` every device computes its part of the batch, and nothing else is communicated than `Layout` says.
    """

    def price_of(batch, layout):
        """The price of one element's probability, so that the sum over the batch is the mean over its elements."""
        price = activation_price * (batch["price"].mean() if "price" in batch else 1.0)
        weight = layout.share(batch["weights"].sum(), batch["weights"].ndim > 1)
        weight, count = layout.sum((weight, layout.share(batch["lengths"].sum().astype(jnp.float32), False)))
        return price * weight / jnp.maximum(count, 1)

    def objective(params, batch_stats, batch, key, price=0.0, mutable=("batch_stats",), model=model, layout=ALONE):
        variables = {"params": layout.gather(params, but="encoder/layers"), "batch_stats": batch_stats}
        out, changed = apply(model, variables, batch, True, mutable, rngs={"dropout": key})
        total, weight, metrics = layout.share(loss(out, batch), out.logits.ndim > 2)
        metrics = metrics | layout.share(activation_metrics(out.layers), True)
        probability = layout.share(out.layers.probability.sum(), True)
        choices = max(out.layers.probability.size, 1)  # layers x modules
        return total + price * probability / choices, (metrics, weight, changed)

    def gradients(params, batch_stats, batch, key, model=model, layout=ALONE):
        """Gradient of the mean, new batch statistics, metrics, and streams, over `accumulate` parts."""
        price, key = price_of(batch, layout), layout.fold(key)
        parts = jax.tree.map(lambda a: a.reshape(accumulate, a.shape[0] // accumulate, *a.shape[1:]), batch)

        def one(before, part_and_index):
            summed, stats = before
            part, index = part_and_index
            gradient, (metrics, weight, changed) = jax.grad(objective, has_aux=True)(
                params, stats, part, jax.random.fold_in(key, index), price, model=model, layout=layout
            )
            summed, stats = jax.tree.map(jnp.add, summed, gradient), changed.get("batch_stats", {})
            return (summed, stats), (metrics, weight, changed["streams"])

        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        (summed, stats), (metrics, weight, streams) = jax.lax.scan(one, start, (parts, jnp.arange(accumulate)))
        streams = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), streams)
        metrics, weight = layout.sum(jax.tree.map(lambda a: a.sum(0), (metrics, weight)))
        scale = 1 / jnp.maximum(weight, 1e-9)
        return jax.tree.map(lambda g: g * scale, layout.sum_gradients(summed)), stats, metrics, streams

    def train(state: TrainState, batch) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = with_streams(batch, state.streams)
        run = gradients if split is None else split.on_devices(gradients, state.params, batch)
        gradient, stats, metrics, streams = run(state.params, state.batch_stats, batch, key)
        norm = optax.tree.norm(gradient)
        # Means of these are per update, in however many parts it was computed.
        metrics = metrics | {"gradient_norm": (norm, jnp.ones(())), "elements": (metrics["elements"][0], jnp.ones(()))}
        updates, opt_state = make_optimizer(state.params).update(gradient, state.opt_state, state.params)
        moved = TrainState(
            step=state.step,
            params=optax.apply_updates(state.params, updates),
            batch_stats=stats,
            opt_state=opt_state,
            metrics=jax.tree.map(jnp.add, state.metrics, metrics),
            bad_step=state.bad_step,
            streams=streams,
        )
        # The update too: a finite gradient may move parameters to where nothing is finite, and they would be saved.
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0]) & _all_finite((moved.params, stats, streams))
        kept = jax.tree.map(lambda new, old: jnp.where(finite & (state.bad_step < 0), new, old), moved, state)
        bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        return dataclasses.replace(kept, step=state.step + 1, bad_step=bad_step)

    def init(seed: int) -> TrainState:
        # A batch of one element: parameters do not depend on the length, and initialisation computes nothing long.
        key = jax.random.fold_in(jax.random.key(seed), INITIALISATION)
        variables = model.init({"params": key}, *arguments(one_element(example)))
        params, stats = variables["params"], variables.get("batch_stats", {})
        empty = lambda count: model.initial_state(count) if streams else {}
        batch = with_streams(example, empty(len(example["inputs"])))
        shapes = jax.eval_shape(lambda: gradients(params, stats, batch, key)[2])
        metrics = {name: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[name]) for name in shapes}
        metrics["gradient_norm"] = (jnp.zeros(()), jnp.zeros(()))
        opt_state = make_optimizer(params).init(params)
        never = jnp.full((), -1, jnp.int32)
        return TrainState(jnp.zeros((), jnp.int32), params, stats, opt_state, metrics, never, empty(streams))

    def forward(params, batch_stats, batch, model=model, layout=ALONE, mutable=()):
        variables = {"params": layout.gather(params, but="encoder/layers"), "batch_stats": batch_stats}
        out, found = apply(model, variables, batch, False, mutable)
        metrics = layout.share(loss(out, batch)[2] | evaluation_metrics(out, batch), out.logits.ndim > 2)
        return layout.sum(metrics | layout.share(activation_metrics(out.layers), True)), out, found

    def sums(params, batch_stats, batch, key, model=model, layout=ALONE):
        metrics, _, found = forward(params, batch_stats, batch, model, layout)
        return metrics, found["streams"]

    def read(variables, batch) -> tuple[Sums, Any]:
        params, stats = variables["params"], variables.get("batch_stats", {})
        run = sums if split is None else split.on_devices(sums, params, batch, gradient=False)
        metrics, streams = run(params, stats, batch, None)
        return _elements_of_a_batch(metrics), streams

    def evaluate(variables, batch) -> Sums:
        return read(variables, batch)[0]

    def examine(variables, batch, tapped=False) -> Examined:
        params, stats = variables["params"], variables.get("batch_stats", {})
        metrics, out, found = forward(params, stats, batch, mutable=("taps",) if tapped else ())

        def alone(logits, example):
            return loss(out._replace(logits=logits[None]), jax.tree.map(lambda a: a[None], example))[2]

        each = jax.vmap(alone)(out.logits, batch)
        return Examined(_elements_of_a_batch(metrics), each, out, found.get("taps", {}), found["streams"])

    return StepFunctions(init, train, evaluate, read, objective, examine)


def apply(model: nn.Module, variables: Any, batch, train: bool, mutable, **rest) -> tuple[Any, dict[str, Any]]:
    """The model's output and changed collections, with the `streams` after the batch, {} if it has none."""
    if "streams" not in batch:
        out, changed = model.apply(variables, *arguments(batch), train, mutable=list(mutable), **rest)
        return out, {**changed, "streams": {}}
    given = (*arguments(batch), batch["streams"], train)
    (out, after), changed = model.apply(variables, *given, method="stream", mutable=list(mutable), **rest)
    return out, {**changed, "streams": after}


def with_streams(batch, streams: Any) -> dict[str, Any]:
    """The batch with the state from which its streams are read on, empty for those that begin; unless there is none."""
    return {**batch, "streams": reset(streams, jnp.asarray(batch["begins"]))} if streams else batch


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or True))


def _elements_of_a_batch(metrics: Sums) -> Sums:
    """The mean of `elements` is per batch."""
    return metrics | {"elements": (metrics["elements"][0], jnp.ones(()))}


def arguments(batch) -> tuple[Any, ...]:
    """What a model is called with: inputs and lengths, and before them the hyper-input of the batch if it has one."""
    own = (batch["inputs"], batch["lengths"])
    return (batch["condition"][0], *own) if "condition" in batch else own


def one_element(batch) -> dict[str, Any]:
    """A batch of one sequence of one element like those of this one."""
    inputs = jnp.zeros((1, 1, *batch["inputs"].shape[2:]), batch["inputs"].dtype)
    own = {"inputs": inputs, "lengths": jnp.ones((1, *batch["lengths"].shape[1:]), jnp.int32)}
    return own | ({"condition": jnp.asarray(batch["condition"][:1])} if "condition" in batch else {})


def activation_metrics(layers: ActivationStats) -> Sums:
    """Per layer (and module, where a layer has several): the share of active elements, their mean confidence, tau."""
    modules = layers.active.shape[-1]
    if modules == 0:
        return {"elements": (layers.elements[0], jnp.ones(()))}
    squeeze = (lambda a: a[..., 0]) if modules == 1 else (lambda a: a)
    elements = jnp.broadcast_to(layers.elements[:, None], layers.active.shape)
    return {
        "elements": (layers.elements[0], jnp.ones(())),
        "activation_rate": (squeeze(layers.active), squeeze(elements)),
        "confidence": (squeeze(layers.confidence), squeeze(layers.active)),
        "temperature": (squeeze(layers.temperature), jnp.ones_like(squeeze(layers.temperature))),
    }


def means(sums: Sums) -> dict[str, Any]:
    """The sums on the host, divided: floats, and nested lists where a metric is per layer. A mean of nothing is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: np.divide(*pair).tolist() for name, pair in jax.device_get(sums).items()}
