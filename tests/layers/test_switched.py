"""The switched form, for accelerators: equal to the dense form, as large as it must be, and without a dynamic loop."""

import collections
import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like, vanishing

from experiments.benchmarks.cases import CASES
from seqboat.layers import execution
from seqboat.layers.execution import How
from seqboat.layers.gau import GatedAttentionUnit
from seqboat.layers.seqboat import ACCELERATOR_BLOCKS, LayerConfig, SeqBoatLayer
from seqboat.layers.windowed import WindowedModule
from seqboat.ops import neighbours
from seqboat.ops.packing import row_info
from seqboat.ops.window import Window
from seqboat.parallel.rules import Layout, Rules

D, BATCH, LENGTH, BLOCK = 6, 2, 15, 8
ROWS = BATCH * LENGTH  # four capacities: 8, 16, 24 and 32 rows


class NeighbourMean(WindowedModule):
    """A windowed module with one method for its mix: the mean of the projections of a row and the one before it."""

    @nn.compact
    def context(self, x, rows):
        return nn.Dense(D)(x)

    def halo(self, length):
        return 1, 0

    def mix(self, x, halo, rows, halo_rows):
        before = rows.rank[:, None] - halo_rows.rank[None]
        see = (rows.segment[:, None] == halo_rows.segment[None]) & halo_rows.active[None] & (before >= 0) & (before < 2)
        return x + jnp.where(see, 1.0, 0.0) @ halo / jnp.maximum(see.sum(1, keepdims=True), 1)


MODULES = {
    "in three parts": GatedAttentionUnit(D, 4, 8, Window(3, False, "softmax", "relative"), 16),
    "in one": NeighbourMean(),
    "row-wise": nn.Dense(D),
}


def activations():
    order = np.random.default_rng(0).permutation(ROWS)
    return {count: jnp.asarray(order < count).reshape(BATCH, LENGTH) for count in (0, 1, 8, 9, 16, 20, ROWS)}


@pytest.mark.parametrize("module", grid(MODULES, "in one"))
def test_equals_the_dense_form_in_values_and_gradients(module, monkeypatch):
    monkeypatch.setattr(execution, "CAPACITIES", 2)  # the fewer branches, the less to compile
    m, cotangent = normal(0, BATCH, LENGTH, D), normal(1, BATCH, LENGTH, D)

    def result(form, active, params, m):
        program = execution.functional(module.bind({"params": params}), {}, False, False)
        y, _, _ = execution.run(program, neighbours.own(m, active), How(form, BLOCK, 2), None)
        return jnp.where(active[..., None], y, 0)

    @jax.jit
    def both(active, *args):
        got, transpose = jax.vjp(lambda *args: result("switched", active, *args), *args)
        expected, transposed = jax.vjp(lambda *args: result("dense", active, *args), *args)
        return (got, transpose(cotangent)), (expected, transposed(cotangent))

    params = random_like(jax.eval_shape(lambda: initial(module)))
    for active in activations().values():
        got, expected = both(active, params, m)
        assert_close(got, expected, floor=vanishing(expected))


def initial(module):
    x, rows = jnp.zeros((2, D)), row_info(jnp.ones((1, 2), bool))
    if not isinstance(module, WindowedModule):
        return module.init(jax.random.key(0), x)["params"]
    everything = lambda module: module.mix(x, module.context(x, rows), rows, rows)
    return nn.init(everything, module)(jax.random.key(0))["params"]


def test_the_smallest_capacity_that_holds_the_active_rows_is_computed():
    seen = []

    class Counting(nn.Module):
        def __call__(self, x):
            jax.debug.callback(lambda rows=x.shape[0]: seen.append(rows))
            return x

    @jax.jit
    def run(active):
        program = execution.functional(Counting().bind({}), {}, False, False)
        return execution.run(program, neighbours.own(normal(0, BATCH, LENGTH, D), active), How("switched", BLOCK), None)

    for active in activations().values():
        jax.block_until_ready(run(active))
    jax.effects_barrier()
    assert seen == [8, 8, 8, 16, 16, 24, 32]


def executed(block, functions) -> collections.Counter:
    """The operations of a lowered program on its longest path: a switch by its largest branch, a loop in full length.

    "decisions" counts what only the device knows: switches by a computed index, and loops of unknown length.
    """
    total = collections.Counter()
    for operation in block.operations:
        name = operation.operation.name.removeprefix("stablehlo.")
        total[name] += 1
        if name == "func.call":
            total += executed(functions[operation.attributes["callee"].value], functions)
        elif name == "case":
            total["decisions"] += operation.operands[0].owner.name not in ("stablehlo.constant", "stablehlo.case")
            branches = (executed(region.blocks[0], functions) for region in operation.regions)
            total += max(branches, key=lambda branch: branch.total())
        elif name == "while":
            length = iterations(operation)
            total["decisions"] += length is None
            for key, count in executed(operation.regions[1].blocks[0], functions).items():
                total[key] += (length or 1) * count
    return total


def iterations(loop) -> int | None:
    """The length of a loop that counts to a constant."""
    (compare,) = (op for op in loop.regions[0].blocks[0].operations if op.operation.name == "stablehlo.compare")
    limit = compare.operands[1].owner
    if getattr(limit, "name", None) != "stablehlo.constant":
        return None
    return int(np.asarray(limit.attributes["value"]).reshape(-1)[0])


# Operations that are kernels of their own on a GPU; what is elementwise fuses with them.
KERNELS = ("dot_general", "fft", "gather", "scatter", "sort", "reduce")


@pytest.mark.breadth  # test_the_smallest_capacity_that_holds_the_active_rows_is_computed
@pytest.mark.parametrize("name", grid(("text", "lm", "enwik8"), "text"))
def test_a_gradient_has_two_decisions_and_few_small_operations(name, monkeypatch):
    """At rate 1: two capacities are enough to find the costlier one, and faster to trace than all."""
    monkeypatch.setattr(execution, "CAPACITIES", 2)
    case = CASES[name]
    config = dataclasses.replace(case.layer, form="switched", blocks_per_iteration=ACCELERATOR_BLOCKS)
    layer, shape = SeqBoatLayer(config), (case.batch, case.length)
    x, valid = jax.ShapeDtypeStruct((*shape, config.features), jnp.float32), jax.ShapeDtypeStruct(shape, bool)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, valid)
    loss = lambda variables, x, valid: layer.apply(variables, x, valid)[0].sum()
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(variables, x, valid).lower(lowering_platforms=("cuda",))
    functions = {f.attributes["sym_name"].value: f.regions[0].blocks[0] for f in lowered.compiler_ir().body.operations}
    count = executed(functions["main"], functions)
    assert count["decisions"] == 2, "one forward and one backward"
    assert count["slice"] <= 450
    assert count["pad"] <= 80
    assert count["while"] <= 6
    assert sum(count[kernel] for kernel in KERNELS) <= 220


@pytest.mark.parametrize(
    ("capability", "fields", "method"),
    [
        ("9.0", {}, "pallas"),
        ("9.0", {"position": "none"}, "pallas"),
        ("7.5", {}, "blocks"),
        ("9.0", {"position": "relative"}, "blocks"),
        ("9.0", {"window_size": None}, "blocks"),
        ("9.0", {"attention_dropout": 0.1}, "blocks"),
        ("9.0", {"form": "dense"}, "blocks"),
        ("9.0", {"layout": Layout(Rules(), (("data", 2),))}, "blocks"),
        ("gfx90a", {}, "blocks"),
    ],
)
def test_attention_of_a_gpu_is_what_was_measured_to_be_faster(capability, fields, method, monkeypatch):
    config = dataclasses.replace(LayerConfig(8, 4, 8, window_size=4, position="rotary"), **fields)
    assert config.method == "blocks"  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert config.method == method
    assert f"attention by {method}" in config.describe(streaming=False)
