"""Resources of a config's training step on a mesh: from shapes, and from its compiled program for simulated devices.

Memory of parameters and optimiser state is exact. Temporary memory is XLA's figure for the CPU program, an estimate for
other backends. Bytes on the wire are those of the program's collectives, assuming ring algorithms. FLOPs are those of
the matrix products at a given activation rate, without recomputation.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from experiments.training.experiment import Experiment
from experiments.training.sharding import Meshed

# TFLOP/s of dense bfloat16 products, GB/s of memory, GB/s to neighbours in one direction. Sources: Google Cloud's pages
# on v5e and v5p; NVIDIA's data sheets of the SXM variants.
ACCELERATORS = {
    "v5e": (197.0, 819.0, 200.0),
    "v5p": (459.0, 2765.0, 600.0),
    "H100": (989.4, 3350.0, 450.0),
    "H200": (989.4, 4800.0, 450.0),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "f64": 8,
    "c64": 8,
}


@dataclasses.dataclass(frozen=True)
class StepFootprint:
    """Bytes and FLOPs per device and step. `wire` has the bytes sent, by mesh axes and kind of collective."""

    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    flops: float
    wire: dict[tuple[str, str], float]

    def seconds(self, accelerator: str) -> dict[str, float]:
        """The time of each resource alone at the published peaks; the longest is a lower bound on the step's time."""
        tflops, memory, link = ACCELERATORS[accelerator]
        # Parameters and optimiser state are read and written; temporaries are written and read.
        moved = 2 * (self.parameter_bytes + self.optimizer_bytes + self.temporary_bytes)
        return {
            "products": self.flops / (tflops * 1e12),
            "memory": moved / (memory * 1e9),
            "links": sum(self.wire.values()) / (link * 1e9),
        }


def make_plan(experiment: Experiment, rate: float) -> StepFootprint:
    """Compiles the training step without running it."""
    partition = experiment.partition
    state = partition.abstract(experiment.functions.init, experiment.seed)
    batch = _abstract_batch(experiment)
    compiled = partition.compile(experiment.functions.train, state, batch, experiment.seed)
    return StepFootprint(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        parameter_bytes=_bytes_on_a_device(state.params),
        optimizer_bytes=_bytes_on_a_device(state.opt_state),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        flops=step_flops(experiment, batch, rate),
        wire=wire_bytes(compiled.as_text(), partition.mesh) if partition.mesh else {},
    )


def step_flops(experiment: Experiment, batch: dict[str, Any], rate: float) -> float:
    """FLOPs of one device, counting the backward pass as two forward passes: those of every element, plus those of
    active elements at the given rate."""
    model, layout = experiment.network.config, experiment.partition.layout
    layer, encoder = model.encoder.layer, model.encoder
    length = batch["inputs"].shape[1]
    # A retrieval example has two lengths, so two sequences.
    elements = batch["lengths"].size * length / layout.size(layout.data)
    own = model.multiplications(length, rate) if hasattr(model, "multiplications") else 0
    return 6 * elements * (encoder.layers * layer.multiplications(length, rate) + own)


def wire_bytes(text: str, mesh: jax.sharding.Mesh) -> dict[tuple[str, str], float]:
    """Bytes that a device sends in a compiled program, by mesh axes and kind of collective."""
    found: dict[tuple[str, str], float] = {}
    for line, kind, times in _collectives(text):
        axes = _axes(line, mesh)
        count = math.prod(mesh.shape[axis] for axis in axes) if axes else 1
        size = times * _result_bytes(line, kind)
        share = (count - 1) / count
        sent = {"all-reduce": 2 * share * size, "reduce-scatter": (count - 1) * size, "collective-permute": size}
        name = (" x ".join(axes) or "-", kind)
        found[name] = found.get(name, 0.0) + sent.get(kind, share * size)
    return found


def _abstract_batch(experiment: Experiment) -> dict[str, Any]:
    batch, partition = experiment.task.train_batch(0), experiment.partition
    if not isinstance(partition, Meshed):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype), partition.put(batch))
    specs = partition.layout.of_batch(batch)
    place = lambda spec: NamedSharding(partition.mesh, spec)
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(specs[name])) for name, a in batch.items()}


def _bytes_on_a_device(tree: Any) -> int:
    own = lambda leaf: leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return sum(math.prod(own(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def computations(text: str) -> dict[str, list[str]]:
    """The computations of a compiled program by name; the entry computation is "ENTRY"."""
    found = {}
    for part in re.split(r"\n(?=(?:ENTRY )?%)", text):
        if head := re.match(r"(ENTRY )?%([\w.\-]+)", part):
            found["ENTRY" if head[1] else head[2]] = part.splitlines()[1:]
    return found


def _collectives(text: str) -> Iterator[tuple[str, str, int]]:
    """Yields (line, kind, number of executions) of each collective. Loops with data-dependent trip counts count once;
    they contain no collectives."""
    bodies = computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[str, str, int]]:
        for line in bodies.get(name, ()):
            kind = next((kind for kind in COLLECTIVES if f" {kind}(" in line or f" {kind}-start(" in line), None)
            if kind:
                yield line, kind, times
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line) if " while(" in line else None
            for called in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?%([\w.\-]+)", line):
                if not kind:
                    yield from walk(called, times * (int(trips[1]) if trips else 1))

    return walk("ENTRY", 1)


def _result_bytes(line: str, kind: str) -> int:
    """Bytes of the shapes to the left of the operation."""
    result = line.split(f" {kind}")[0].partition("=")[2]
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in shapes)


def _axes(line: str, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of the first group, or first pair, differ."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        group = [int(pairs[1]), int(pairs[2])]
    elif groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = [int(device) for device in groups[1].split(",")]
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(source)))
        devices = np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)
        group = devices[0].reshape(-1).tolist()
    else:  # all devices
        return tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
    places = np.array([np.unravel_index(device, mesh.devices.shape) for device in group])
    return tuple(name for name, column in zip(mesh.axis_names, places.T, strict=True) if len(set(column)) > 1)
