"""What a report shows: the taps of a trained model on examples spread over a split, and what follows from them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.common.errors import UserError
from experiments.evaluation.examples import is_example, standard_errors
from experiments.training.restore import Run
from experiments.training.step import Sums
from seqboat.interp import attribution
from seqboat.ops.packing import row_info
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend

# Activated elements per sequence whose attention weights are computed.
QUERIES = 64
# Elements of a batch: the taps of a layer are a few hundred numbers for each.
ELEMENTS = 32_768

Example = dict[str, np.ndarray]


class Margin(NamedTuple):
    """How one element's decision came about. It is exact, as the router is linear in m = silu(SSM):

        u_1 - u_0 = sum_d (m - mean)_d (W_1 - W_0)_d + (b_1 - b_0)

    `channels` (D,) are the terms of the sum, `bias` is the last term, `logits` the difference as the model computed it,
    in its own precision. `mean` is that of a centred router, else 0.
    """

    series: int
    position: int
    channels: Float[np.ndarray, " D"]
    bias: float
    logits: float


class Span(NamedTuple):
    """How far attention reaches from activated elements, in original positions.

    `reach` (A,) of every activated element: the distance to the farthest one that its window holds, the oldest if the
    model is causal. `attended` (Q,) of up to QUERIES per sequence: the distance to what it reads, averaged with the
    attention weights; each represents `weights` (Q,) elements of its sequence.
    """

    reach: np.ndarray
    attended: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measured:
    """S series, one for each layer and sparse module, layer by layer; n sequences of L elements.

    `valid` (n, L) elements are not padding; `active` and `confidence` (S, n, L); `spans` of the series that attend.
    `examples` are rows of batches, `numbers` their indices among the `total` of the split; a pair of documents is two
    consecutive sequences. `answers` are the most likely classes or symbols; `metrics` name ->
    (mean, standard error) over the examples; `distances` the squared ones to prototypes, if the head has them.
    """

    names: tuple[str, ...]
    valid: Bool[np.ndarray, "n L"]
    active: Bool[np.ndarray, "S n L"]
    confidence: Float[np.ndarray, "S n L"]
    spans: dict[str, Span]
    examples: tuple[Example, ...]
    numbers: tuple[int, ...]
    answers: np.ndarray
    total: int
    metrics: dict[str, tuple[float, float | None]]
    margins: tuple[Margin, ...]
    distances: Float[np.ndarray, "n P"] | None

    def rates(self) -> Float[np.ndarray, " S"]:
        """The activation rate of every series."""
        return self.active.sum((1, 2)) / max(self.valid.sum(), 1)


def measure(run: Run, split: str, examples: int, element: int | None = None) -> Measured:
    """Raises UserError if there is no such split, or no such element in the first example."""
    found_examples, total = spread(run.task.evaluation_batches(split), examples)
    numbers, chosen = tuple(found_examples), list(found_examples.values())
    if not chosen:
        raise UserError(f"the {split} split is empty: there is nothing to report")
    layer, layers = run.model.config.encoder.layer, run.model.config.encoder.layers
    modules = layer.make_modules()
    names = [
        f"layer {number}" + (f", {module.name.replace('_', ' ')}" if len(modules) > 1 else "")
        for number in range(1, layers + 1)
        for module in modules
    ]
    look = jax.jit(lambda *a: _look(run, *a))
    found: list[dict[str, np.ndarray]] = []
    scores: list[Sums] = []
    first: dict[str, np.ndarray] = {}
    for batch, count in batches(chosen):
        taps, own, each, of_first = jax.device_get(look(run.variables, batch))
        pairs = batch["lengths"][0].size
        # (layers, B, ...) -> (B, ...), so that batches can be joined.
        taps = {name: np.moveaxis(array, 1, 0)[: count * pairs] for name, array in taps.items()}
        found.append(taps | {name: array[:count] for name, array in own.items()})
        scores.append(jax.tree.map(lambda a, count=count: a[:count], each))
        first = first or of_first
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    per_example = jax.tree.map(lambda *a: np.concatenate(a).astype(np.float64), *scores)
    errors = standard_errors(per_example)
    lengths = np.concatenate([example["lengths"].reshape(-1) for example in chosen])
    length = chosen[0]["inputs"].shape[0]
    series = lambda array: np.moveaxis(array, (1, 3), (0, 1)).reshape(-1, len(lengths), length)
    active, window = series(joined["active"]), layer.make_window()
    spans = {}  # of the series that attend
    for number in range(len(names)):
        if _attends(modules[number % len(modules)]):
            of_layer = joined["distance"][:, number // len(modules)]
            spans[names[number]] = Span(reach(window, active[number]), *attended(of_layer, active[number]))
    return Measured(
        names=tuple(names),
        valid=np.arange(length)[None] < lengths[:, None],
        active=active,
        confidence=series(joined["confidence"]),
        spans=spans,
        examples=tuple(chosen),
        numbers=numbers,
        answers=joined["answers"],
        total=total,
        metrics={name: (float(s.sum() / w.sum()), errors[name]) for name, (s, w) in per_example.items()},
        margins=margins(run, first, lengths[0], element) if first else (),
        distances=joined.get("distances"),
    )


def _attends(module: Any) -> bool:
    return hasattr(module, "window")


def spread(batches: Iterator[Mapping[str, np.ndarray]], count: int) -> tuple[dict[int, Example], int]:
    """`count` evenly spaced examples of a split by index, or all if there are fewer, and the size of the split.

    Never holds more than twice `count` examples.
    """
    kept: list[tuple[int, Example]] = []
    stride, total = 1, 0
    for batch in batches:
        for row in np.flatnonzero(is_example(batch)).tolist():
            if total % stride == 0:
                kept.append((total, {name: np.array(array[row]) for name, array in batch.items()}))
            total += 1
            if len(kept) == 2 * count:
                kept, stride = kept[::2], 2 * stride
    places = np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int)
    return {kept[place][0]: kept[place][1] for place in places}, total


def reach(window: Window, active: Bool[np.ndarray, "n L"]) -> Int[np.ndarray, " A"]:
    """Of every activated element the distance in original positions to the farthest that it may read: the w-th
    activated element before it, or after it if the model is not causal, or the last one."""
    found = [np.zeros(0, int)]
    for row in active:
        place = np.flatnonzero(row)
        rank, w = np.arange(len(place)), len(place) if window.size is None else window.size
        before = place - place[np.maximum(rank - w, 0)]
        after = place[np.minimum(rank + w, len(place) - 1)] - place
        found.append(before if window.causal else np.maximum(before, after))
    return np.concatenate(found)


def attended(
    distance: Float[np.ndarray, "n queries"], active: Bool[np.ndarray, "n L"]
) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """The distances of `mean_distance` that are known, and how many activated elements each stands for."""
    known = np.isfinite(distance)
    weights = active.sum(1) / np.maximum(known.sum(1), 1)
    return distance[known], np.broadcast_to(weights[:, None], known.shape)[known]


def margins(run: Run, taps: Mapping[str, np.ndarray], length: int, element: int | None = None) -> tuple[Margin, ...]:
    """Every series' decision for one element of a sequence: by default that of its largest margin.

    `taps` are the sequence's `m` (layers, L, D) and `router_logits` (layers, L, M, 2). Raises UserError for an
    element beyond its `length`.
    """
    if element is not None and not 0 <= element < length:
        raise UserError(f"--element={element}: the first example has {length} elements, the first of them is 0")
    m = jnp.asarray(taps["m"][:, :length], jnp.float32)
    logits = np.asarray(taps["router_logits"][:, :length], np.float64)
    found = []
    for layer, module in np.ndindex(logits.shape[0], logits.shape[2]):
        router = attribution.router(run.variables, layer + 1, module)
        difference = logits[layer, :, module, 1] - logits[layer, :, module, 0]
        at = int(difference.argmax()) if element is None else element
        channels = np.asarray(attribution.margin_by_channel(router, m[layer, at]), np.float64)
        series = layer * logits.shape[2] + module
        found.append(Margin(series, at, channels, float(router.bias), float(difference[at])))
    return tuple(found)


def _look(run: Run, variables: Any, batch: Any) -> tuple[dict[str, Array], dict[str, Array], Sums, dict[str, Array]]:
    """`active` and `confidence` (layers, B, L, M), and `distance` (layers, B, QUERIES) if anything attends; the
    answers, and the distances to prototypes if there are some; the metrics of every example; what `margins` needs of
    the first sequence if there is a router."""
    layer = run.model.config.encoder.layer
    examined = run.experiment.functions.evaluate_examples(variables, batch, tapped=True)
    layers = examined.taps["encoder"]["layers"]
    taps = {**layers, **layers["sparse"], **layers["sparse"].get("configurator", {})}
    found = {name: taps[name] for name in ("active", "confidence")}
    if any(map(_attends, layer.make_modules())):
        table = variables["params"]["encoder"]["layers"]["gau"].get("position_bias")

        def one_layer(of):
            layer_table, *rows = of
            return jax.lax.map(lambda row: mean_distance(layer.make_window(), layer_table, *row), tuple(rows))

        # The GAU is the first sparse module.
        found["distance"] = jax.lax.map(one_layer, (table, taps["q"], taps["k"], taps["active"][..., 0]))
    decided = ("m", "router_logits") if "router_logits" in taps else ()
    first = {name: taps[name][:, 0] for name in decided}
    own = {"answers": jnp.argmax(examined.output.logits, axis=-1)}
    if "prototype_distances" in (head := examined.taps.get("head", {})):
        own["distances"] = head["prototype_distances"]
    return found, own, examined.examples, first


def mean_distance(
    window: Window,
    table: Float[Array, " P"] | None,
    q: Float[Array, "L Z"],
    k: Float[Array, "L Z"],
    active: Bool[Array, " L"],
) -> Float[Array, " queries"]:
    """sum_j a_ij |i - j| of QUERIES activated elements i, evenly spaced, a_ij their attention over positions j.

    Computed by `attend` itself, with distances in place of values; a is normalised if the function is not. NaN where
    there are fewer elements, and where an element reads nothing.
    """
    rows = row_info(active[None])
    q, k = window.apply_rotary(q, rows), window.apply_rotary(k, rows)
    total, number = active.sum(), jnp.arange(QUERIES)
    rank = jnp.where(total <= QUERIES, number, ((number + 0.5) * total / QUERIES).astype(jnp.int32))
    index = jnp.searchsorted(jnp.cumsum(active), rank + 1)

    def one(i: Array) -> Array:
        distance = jnp.abs(rows.position - rows.position[i]).astype(jnp.float32)
        values = jnp.stack([distance, jnp.ones_like(distance)], axis=1)
        query = jax.tree.map(lambda a: a[i][None], rows)
        weighted, weight = attend(window, table, q[i][None], k, values, query, rows)[0]
        return jnp.where(weight > 0, weighted / jnp.where(weight > 0, weight, 1), jnp.nan)

    return jnp.where(rank < total, jax.vmap(one)(jnp.minimum(index, len(active) - 1)), jnp.nan)


def sequences(example: Example) -> list[tuple[np.ndarray, int]]:
    """The sequences of an example and their lengths: one, or the two documents of a pair."""
    inputs, lengths = _sequences(example["inputs"][None], example["lengths"][None])
    return list(zip(inputs, lengths.tolist(), strict=True))


def _sequences(inputs: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if lengths.ndim == 2:
        inputs = np.moveaxis(inputs, 2, 1).reshape(-1, inputs.shape[1])
    return inputs, lengths.reshape(-1)


def batches(examples: list[Example]) -> Iterator[tuple[Example, int]]:
    """Batches of one shape, and how many rows of each are examples: the last one is filled with rows of weight 0."""
    inputs = examples[0]["inputs"]
    elements = inputs.shape[0] * examples[0]["lengths"].size
    size = min(len(examples), max(1, ELEMENTS // elements))
    for first in range(0, len(examples), size):
        rows = examples[first : first + size]
        filling = [{name: np.zeros_like(array) for name, array in rows[0].items()}] * (size - len(rows))
        yield {name: np.stack([row[name] for row in [*rows, *filling]]) for name in rows[0]}, len(rows)
