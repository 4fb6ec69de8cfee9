"""Placement of state and batches, and execution of steps: on one device, on a mesh under jit, or under pmap.

A partition has a `layout` and a `mesh`, for `step.ShardedStep`; `rows`, the part of every batch that this process reads
as (index, number of parts); and

    abstract(init, seed)                  shapes, dtypes and shardings of a state
    create(init, seed)                    a new state, created with its sharding
    put_state(state)                      a state, moved to its sharding
    put(batch)                            a batch on the devices, from this process's rows
    compile(train, state, batch, seed)    the training step, which donates the state
    evaluate(evaluate)                    the evaluation step, or the evaluation of streams
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.common.errors import UserError
from experiments.training.step import TrainState
from seqboat.parallel.mesh import make_mesh
from seqboat.parallel.rules import SINGLE_DEVICE, Layout, Rules


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The first device, without sharding."""

    layout: Layout = SINGLE_DEVICE
    mesh: None = None
    rows: tuple[int, int] = (0, 1)

    def abstract(self, init, seed):
        return jax.eval_shape(init, seed)

    def create(self, init, seed):
        return jax.jit(init)(seed)

    def put_state(self, state):
        return jax.device_put(state)

    def put(self, batch):
        return batch

    def compile(self, train, state, batch, seed):
        return jax.jit(train, donate_argnums=0).lower(state, batch, seed).compile()

    def evaluate(self, evaluate):
        return jax.jit(evaluate)

    def describe(self) -> str:
        others = jax.device_count() - 1
        return "one device" + (f" of {others + 1}; --config.mesh=data uses all of them" if others else "")


@dataclasses.dataclass(frozen=True)
class Meshed:
    """A mesh of devices of any number of processes. The layout shards parameters and optimiser state."""

    mesh: jax.sharding.Mesh
    layout: Layout
    rows: tuple[int, int]

    def abstract(self, init, seed):
        state = jax.eval_shape(init, seed)
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(place, state, self._shardings(state))

    def create(self, init, seed):
        return jax.jit(init, out_shardings=self._shardings(jax.eval_shape(init, seed)))(seed)

    def put_state(self, state):
        # Not device_put, which is limited to this process's devices.
        whole = lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, lambda i: np.asarray(leaf)[i])
        return jax.tree.map(whole, state, self._shardings(state))

    def put(self, batch):
        def array(name, spec):
            own = np.asarray(batch[name])
            shape = (len(own) * self.rows[1], *own.shape[1:])
            return jax.make_array_from_process_local_data(NamedSharding(self.mesh, spec), own, shape)

        return {name: array(name, spec) for name, spec in self.layout.of_batch(batch).items()}

    def compile(self, train, state, batch, seed):
        program = jax.jit(train, donate_argnums=0, out_shardings=self._shardings(state))
        return program.lower(state, batch, seed).compile()

    def evaluate(self, evaluate):
        return jax.jit(evaluate)

    def describe(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        return f"a mesh of {self.mesh.size} devices: {sizes or 'data 1'}"

    def _shardings(self, state: TrainState) -> TrainState:
        """The sharding of every leaf: parameters and per-parameter optimiser state by the rules, stream state like the
        rows of batches, the rest replicated."""
        specs = jax.tree.map(lambda _: PartitionSpec(), state)
        specs = dataclasses.replace(
            specs,
            params=self.layout.of_parameters(state.params),
            opt_state=self.layout.of_parameters(state.opt_state),
            streams=jax.tree.map(lambda _: self.layout.per_sequence, state.streams),
        )
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)


@dataclasses.dataclass(frozen=True)
class Pmapped(OneDevice):
    """Devices of one process under `jax.pmap`, with the batch split among them and the state copied to each every
    step."""

    def put(self, batch):
        count = self.layout.size(self.layout.batch)
        return jax.tree.map(lambda a: np.reshape(a, (count, -1, *np.shape(a)[1:])), batch)

    def compile(self, train, state, batch, seed):
        return jax.pmap(train, axis_name="data", in_axes=(None, 0, None), out_axes=None)

    def evaluate(self, evaluate):
        return jax.pmap(evaluate, axis_name="data", in_axes=(None, 0), out_axes=None)

    def describe(self) -> str:
        return f"pmap over {self.layout.size(self.layout.batch)} devices"


Partition = OneDevice | Meshed


def make_partition(words: str | None) -> Partition:
    """The partition for `config.mesh`; None is one device, or the data axis for several processes."""
    if words is None and jax.process_count() == 1:
        return OneDevice()
    if words == "pmap":
        if jax.process_count() > 1:
            raise UserError("config.mesh='pmap': only for one process; use a mesh, for instance 'data'")
        return Pmapped(Layout(Rules(), (("data", jax.device_count()),)))
    try:
        mesh = make_mesh("data" if words is None else words)
    except ValueError as error:
        raise UserError(f"config.mesh={words!r}: {error}") from error
    layout = Layout.of(mesh)
    return Meshed(mesh, layout, _rows(mesh, layout))


def _rows(mesh: jax.sharding.Mesh, layout: Layout) -> tuple[int, int]:
    """The part of a batch that this process reads, as (index, number of parts); processes that share sequences read the
    same part."""
    parts: dict[int, set[int]] = {}
    split = [mesh.axis_names.index(axis) for axis in layout.batch]
    sizes = [mesh.devices.shape[axis] for axis in split]
    for index, device in np.ndenumerate(mesh.devices):
        part = int(np.ravel_multi_index([index[axis] for axis in split], sizes)) if split else 0
        parts.setdefault(device.process_index, set()).add(part)
    distinct = sorted({tuple(sorted(own)) for own in parts.values()})
    if sum(map(len, distinct)) != layout.size(layout.batch) or len({len(own) for own in distinct}) > 1:
        raise UserError("the devices of the processes do not hold equal parts of a batch: reorder the mesh axes")
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)
