"""One training step and one evaluation step: pure functions of a state and a batch."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from seqboat.layers.router import ActivationStats
from seqboat.layers.streaming import reset
from seqboat.layers.terms import collect
from seqboat.parallel.rules import SINGLE_DEVICE, Layout


class Batch(TypedDict, total=False):
    """A batch of B rows, made by a task's loader and read by a step. All values are arrays, except `streams`."""

    inputs: Any  # (B, L) int32 ids, or (B, L, C) float32
    lengths: Any  # (B,) int32: the true length of each row; (B, 2) for pairs
    targets: Any  # (B,) classes, or (B, L) next ids
    weights: Any  # (B,) or (B, L) float32: the weight of each target; 0 for rows that pad the batch
    begins: Any  # (B,) bool: whether the row's stream restarts here
    streams: Any  # the model's state for each row's stream: a tree of (B, ...)
    condition: Any  # (B, M) float32: the hyper-input, equal in all rows
    penalty: Any  # (B,) float32: multiplies `activation_penalty`


# Folded into the seed for initial parameters; steps fold in their own, smaller, numbers.
INITIALISATION = 2**32 - 1

# name -> (sum, weight): divided only at the very end, so that means are exact over batches of any size.
Sums = dict[str, tuple[Any, Any]]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to resume, after `step` steps.

    `metrics` are sums since the last report. `bad_step` is the first step whose loss, gradient or update was not
    finite, or -1; from then on nothing changes, so the state stays the last good one. `streams` is the model's state
    for the streams in the rows of batches, {} without streams. `frozen` is what objectives have that is never trained,
    by name.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    metrics: Sums
    bad_step: jax.Array
    streams: Any
    frozen: Any = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ShardedStep:
    """A step split over devices: `model` computes a device's part, on `mesh`, or under pmap if that is None."""

    model: nn.Module
    layout: Layout
    mesh: jax.sharding.Mesh | None


class PerExample(NamedTuple):
    """Per-example results of a batch: `total` as returned by `evaluate`, `examples` the metrics of the loss as pairs of
    (B,) arrays, the model's `output`, its `taps` (`seqboat.layers.taps`) if requested, and the state of its `streams`
    after the batch, if any."""

    total: Sums
    examples: Sums
    output: Any
    taps: Any
    streams: Any


@dataclasses.dataclass(frozen=True, eq=False)
class StepFunctions:
    """What a step computes for a model and a task's loss: `init`, `train`, `evaluate` and its relatives, pure functions
    to be jitted. Variables of those may hold `edits` of named values (`seqboat.layers.taps`); training has none.

    The seed, a uint32, is an argument and not a constant, so that runs that differ in nothing else share programs.

    The objective is  sum of losses / sum of weights + activation_penalty * mean activation probability,  the same for
    any `accumulate`, the number of parts a batch is computed in. Dropout draws from (seed, step). `loss(output, batch)`
    returns the sum of losses, the sum of weights and metrics; `make_optimizer(params)` returns an optax transformation.
    `example` is a process's batch, for shapes. `evaluation_metrics` are reported by evaluation besides the loss's own.

    If `num_streams` > 0, the rows of batches, over all processes, are that many persistent streams, whose state is
    reset where `begins` (B,) is True. Training is truncated backpropagation: values flow from one batch to the next,
    gradients do not. A batch with `streams`, a state, continues from it.

    `objectives` are those of `experiments.training.objectives`, by name; they add to the loss in training only.

    If `sharded`, every device computes its part of the batch, and communicates only as its `Layout` says.
    """

    model: nn.Module
    loss: Callable[[Any, Any], tuple[Any, Any, Sums]]
    make_optimizer: Callable[[Any], optax.GradientTransformation]
    example: Mapping[str, Any]
    _: dataclasses.KW_ONLY
    accumulate: int = 1
    activation_penalty: float = 0.0
    num_streams: int = 0
    evaluation_metrics: Callable[[Any, Any], Sums] = lambda output, batch: {}
    sharded: ShardedStep | None = None
    layout: Layout = SINGLE_DEVICE
    objectives: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def train(self, state: TrainState, batch: Batch, seed) -> TrainState:
        """One training step. If any of its values is not finite, the state stays as it was, with `bad_step` set."""
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = with_streams(batch, state.streams)
        run = self._on_devices("gradients", state.params, batch)
        gradient, stats, metrics, streams = run(
            state.params, state.batch_stats, batch, key, self._guides(state.frozen, state.step)
        )
        updates, opt_state = self.make_optimizer(state.params).update(gradient, state.opt_state, state.params)
        norm, params = optax.tree.norm(gradient), optax.apply_updates(state.params, updates)
        # Means of these are per step, regardless of accumulation.
        metrics = metrics | {"gradient_norm": (norm, jnp.ones(())), "elements": (metrics["elements"][0], jnp.ones(()))}
        moved = dataclasses.replace(
            state,
            params=params,
            batch_stats=stats,
            opt_state=opt_state,
            metrics=jax.tree.map(jnp.add, state.metrics, metrics),
            streams=streams,
        )
        # Also the update: a finite gradient may give parameters that are not finite, which would be saved.
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0]) & _all_finite((params, stats, streams))
        kept = jax.tree.map(lambda new, old: jnp.where(finite & (state.bad_step < 0), new, old), moved, state)
        bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        return dataclasses.replace(kept, step=state.step + 1, bad_step=bad_step)

    def gradients(self, params, batch_stats, batch: Batch, key, guides):
        """Gradient of the objective, new batch statistics, metrics and streams, over `accumulate` parts of the
        batch."""
        penalty, key = self._penalty(batch), self.layout.fold(key)
        split = lambda a: a.reshape(self.accumulate, a.shape[0] // self.accumulate, *a.shape[1:])

        def one(before, part_and_index):
            summed, stats = before
            part, index = part_and_index
            gradient, (metrics, weight, changed) = jax.grad(self.objective, has_aux=True)(
                params, stats, part, jax.random.fold_in(key, index), penalty, guides=guides
            )
            summed, stats = jax.tree.map(jnp.add, summed, gradient), changed.get("batch_stats", {})
            return (summed, stats), (metrics, weight, changed["streams"])

        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        parts = (jax.tree.map(split, batch), jnp.arange(self.accumulate))
        (summed, stats), (metrics, weight, streams) = jax.lax.scan(one, start, parts)
        streams = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), streams)
        metrics, weight = self.layout.sum(jax.tree.map(lambda a: a.sum(0), (metrics, weight)))
        scale = 1 / jnp.maximum(weight, 1e-9)
        return jax.tree.map(lambda g: g * scale, self.layout.sum_gradients(summed)), stats, metrics, streams

    def objective(
        self, params, batch_stats, batch: Batch, key, penalty=0.0, mutable=("batch_stats", "terms"), guides=None
    ):
        """The differentiated sum: losses, plus `penalty` times the activation probabilities, plus the modules' terms
        (`seqboat.layers.terms`), whose means count with the weight of this part of the batch, and with `guides` what
        the objectives add."""
        if guides and any(objective.taps for objective in self.objectives.values()):
            mutable = (*mutable, "taps")
        variables = {"params": self.layout.gather(params, but="encoder/layers"), "batch_stats": batch_stats}
        out, changed = apply(self.model, variables, batch, True, mutable, rngs={"dropout": key})
        total, weight, metrics = self.layout.share(self.loss(out, batch), out.logits.ndim > 2)
        metrics = metrics | self.layout.share(activation_metrics(out.layers), True)
        probability = self.layout.share(out.layers.probability.sum(), True)
        choices = max(out.layers.probability.size, 1)  # layers x modules
        for name, term in collect(changed.get("terms", {})).items():
            total += weight * term.scaled / jnp.maximum(term.weight, 1e-9)
            metrics |= {f"term/{name}": self.layout.share((term.total, term.weight), True)}
        total = total + penalty * probability / choices
        if guides:
            added, seen = self._objectives(guides, params, out, changed.get("taps", {}), batch, key)
            total, metrics = total + weight * added, metrics | self.layout.share(seen, True)
        return total, (metrics, weight, changed)

    def _guides(self, frozen, step):
        """What objectives need of a state; {} without them, so that the step has no more arguments."""
        return {"frozen": frozen, "step": step} if self.objectives else {}

    def _objectives(self, guides, params, out, taps, batch: Batch, key):
        """The sum of coefficient * sum / weight, and metrics."""
        total, metrics = jnp.zeros(()), {}
        for name, objective in self.objectives.items():
            frozen, own = guides["frozen"][name], jax.random.fold_in(key, zlib.crc32(name.encode()))
            found = objective(frozen, params, out, taps, batch, own, guides["step"])
            for term, (coefficient, value, weight) in found.items():
                total += coefficient * value / jnp.maximum(weight, 1e-9)
                metrics[f"{name}/{term}"] = (value, weight)
        return total, metrics

    def variables(self, seed) -> dict[str, Any]:
        """Initial `params` and `batch_stats`."""
        return initial_variables(self.model, self.example, seed)

    def init(self, seed) -> TrainState:
        variables, key, example = self.variables(seed), jax.random.key(seed), self.example
        params, stats = variables["params"], variables["batch_stats"]
        empty = lambda count: self.model.initial_state(count) if self.num_streams else {}
        batch = with_streams(example, empty(len(example["inputs"])))
        shapes = {name: objective.abstract() for name, objective in self.objectives.items()}
        frozen = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        guides = self._guides(frozen, jnp.zeros((), jnp.int32))
        shapes = jax.eval_shape(lambda: self.gradients(params, stats, batch, key, guides)[2])
        metrics = {name: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[name]) for name in shapes}
        metrics["gradient_norm"] = (jnp.zeros(()), jnp.zeros(()))
        opt_state = self.make_optimizer(params).init(params)
        never = jnp.full((), -1, jnp.int32)
        streams, step = empty(self.num_streams), jnp.zeros((), jnp.int32)
        return TrainState(step, params, stats, opt_state, metrics, never, streams, frozen)

    def evaluate(self, variables, batch: Batch) -> Sums:
        """Sums of a batch's metrics."""
        return self.evaluate_stream(variables, batch)[0]

    def evaluate_stream(self, variables, batch: Batch) -> tuple[Sums, Any]:
        """`evaluate`, plus the state of the batch's `streams` after it."""
        params, others = _split(variables)
        metrics, streams = self._on_devices("sums", params, batch, gradient=False)(params, others, batch, None)
        return _elements_of_a_batch(metrics), streams

    def evaluate_examples(self, variables, batch: Batch, tapped: bool = False) -> PerExample:
        """`evaluate` example by example, on one device."""
        metrics, out, found = self.forward(*_split(variables), batch, mutable=("taps",) if tapped else ())

        fields = {name: getattr(out, name) for name in out._fields if name != "layers"}

        def alone(fields, example):
            fields, example = jax.tree.map(lambda a: a[None], (fields, example))
            return self.loss(out._replace(**fields), example)[2]

        each = jax.vmap(alone)(fields, batch)
        return PerExample(_elements_of_a_batch(metrics), each, out, found.get("taps", {}), found["streams"])

    def forward(self, params, others, batch: Batch, mutable=()):
        """Metrics, the model's output and its changed collections, without dropout; `others` are collections."""
        variables = {"params": self.layout.gather(params, but="encoder/layers"), **others}
        out, found = apply(self.model, variables, batch, False, mutable)
        own = self.loss(out, batch)[2] | self.evaluation_metrics(out, batch)
        metrics = self.layout.share(own, out.logits.ndim > 2)
        return self.layout.sum(metrics | self.layout.share(activation_metrics(out.layers), True)), out, found

    def sums(self, params, others, batch: Batch, key):
        metrics, _, found = self.forward(params, others, batch)
        return metrics, found["streams"]

    def _penalty(self, batch: Batch):
        """The penalty per token's probability, scaled so that the sum over the batch is the mean over its tokens."""
        penalty = self.activation_penalty * (batch["penalty"].mean() if "penalty" in batch else 1.0)
        weight = self.layout.share(batch["weights"].sum(), batch["weights"].ndim > 1)
        elements = self.layout.share(batch["lengths"].sum().astype(jnp.float32), False)
        weight, count = self.layout.sum((weight, elements))
        return penalty * weight / jnp.maximum(count, 1)

    def _on_devices(self, method: str, params, batch: Batch, gradient: bool = True) -> Callable:
        """A method of (params, batch_stats, batch, key), mapped over devices if the step is sharded. Its result ends
        with the streams and, with `gradient`, starts with the gradient, and its arguments end with the guides."""
        if self.sharded is None:
            return getattr(self, method)
        layout, mesh = self.sharded.layout, self.sharded.mesh
        part = getattr(dataclasses.replace(self, model=self.sharded.model, layout=layout, sharded=None), method)
        if mesh is None:
            return part
        whole, specs = PartitionSpec(), layout.of_parameters(params)
        given = (specs, whole, layout.of_batch(batch), whole, *((whole,) if gradient else ()))
        results = (specs, whole, whole, layout.per_sequence) if gradient else (whole, layout.per_sequence)
        return jax.shard_map(part, mesh=mesh, in_specs=given, out_specs=results, check_vma=False)


def _split(variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The parameters, and what else evaluation reads: batch statistics, and edits of named values
    (`seqboat.layers.taps`)."""
    others = {"batch_stats": {}, **{name: variables[name] for name in ("batch_stats", "edits") if name in variables}}
    return variables["params"], others


def apply(model: nn.Module, variables: Any, batch, train: bool, mutable, **rest) -> tuple[Any, dict[str, Any]]:
    """The model's output and changed collections, including the `streams` after the batch, {} without streams."""
    if "streams" not in batch:
        out, changed = model.apply(variables, *arguments(batch), train, mutable=list(mutable), **rest)
        return out, {**changed, "streams": {}}
    given = (*arguments(batch), batch["streams"], train)
    (out, after), changed = model.apply(variables, *given, method="stream", mutable=list(mutable), **rest)
    return out, {**changed, "streams": after}


def with_streams(batch: Mapping[str, Any], streams: Any) -> Any:
    """The batch with the state its streams continue from, reset for those that begin; unchanged without streams."""
    return {**batch, "streams": reset(streams, jnp.asarray(batch["begins"]))} if streams else batch


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or True))


def _elements_of_a_batch(metrics: Sums) -> Sums:
    """The mean of `elements` is per batch."""
    return metrics | {"elements": (metrics["elements"][0], jnp.ones(()))}


def arguments(batch) -> tuple[Any, ...]:
    """The arguments of a model: inputs and lengths, preceded by the batch's hyper-input if it has one."""
    own = (batch["inputs"], batch["lengths"])
    return (batch["condition"][0], *own) if "condition" in batch else own


def initial_variables(model: nn.Module, example: Mapping[str, Any], seed) -> dict[str, Any]:
    """Initial `params` and `batch_stats` of a model for batches like the example."""
    # One element suffices: parameter shapes do not depend on the length, and initialisation stays cheap.
    key = jax.random.fold_in(jax.random.key(seed), INITIALISATION)
    variables = model.init({"params": key}, *arguments(one_element(example)))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def one_element(batch) -> dict[str, Any]:
    """A batch of one sequence of one element, with the given batch's keys and dtypes."""
    inputs = jnp.zeros((1, 1, *batch["inputs"].shape[2:]), batch["inputs"].dtype)
    own = {"inputs": inputs, "lengths": jnp.ones((1, *batch["lengths"].shape[1:]), jnp.int32)}
    return own | ({"condition": jnp.asarray(batch["condition"][:1])} if "condition" in batch else {})


def activation_metrics(layers: ActivationStats) -> Sums:
    """Per layer (and module, if several): activation rate, mean confidence of active elements, tau."""
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
    """The means on the host: floats, or nested lists for metrics per layer. An empty mean is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: np.divide(*pair).tolist() for name, pair in jax.device_get(sums).items()}
