"""What the compiled programs do: where a head runs, what it holds in memory, and what it sends between devices."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqboat import hyper
from seqboat.paths import flatten
from tests.helpers import grid, random_like
from tests.hyper.targets import MLP, X

KEY, HALF = jax.random.key(0), jnp.array([0.5])


def started(network: hyper.HyperNetwork):
    """Its parameters, without compiling an initialiser."""
    return random_like(jax.eval_shape(network.init, KEY, HALF))


def products(jaxpr, width: int, inside: bool = False) -> list[bool]:
    """Of every matrix product whose contracted axis has this width: whether it runs inside a loop."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            if any(equation.invars[0].aval.shape[axis] == width for axis in contracted):
                found.append(inside)
        loop = inside or equation.primitive.name in ("scan", "while")
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found += products(getattr(inner, "jaxpr", inner), width, loop)
    return found


@pytest.mark.parametrize("steps", grid((3, 50), 50))
def test_generation_is_outside_the_loop_over_time(steps):
    net, x = nn.RNN(nn.OptimizedLSTMCell(8)), jnp.ones((2, steps, 3))
    spec = hyper.spec(net, x)
    model = hyper.Hyper(net, hyper.mip(spec, hidden=(5, 37)))
    variables = jax.eval_shape(model.init, KEY, HALF, x)
    heads = products(jax.make_jaxpr(model.apply)(variables, HALF, x).jaxpr, 37)
    assert heads == [False] * len(spec.leaves)  # one product a leaf, none in the scan
    bound = jax.eval_shape(lambda v: hyper.bind(model, v, HALF), variables)
    assert products(jax.make_jaxpr(net.apply)(bound, x).jaxpr, 37) == []
    assert set(flatten(bound["params"])) == {leaf.path for leaf in spec}


@pytest.mark.breadth  # tests/parallel/test_rules.py: how parameters are split
def test_a_split_head_is_not_gathered():
    """Kernels split by columns, heads likewise: theta is generated in its place, and nothing makes a head whole."""
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("fsdp_hidden",))
    net = MLP((64, 64), 32, use_bias=False)
    spec = hyper.spec(net, X)
    model = hyper.Hyper(net, hyper.mip(spec))
    variables = jax.jit(model.init)(KEY, HALF, X)

    def place(path, leaf):
        columns = path[-1].key == "kernel" and ("target" in str(path) or "full" in str(path))
        axes = (None,) * (leaf.ndim - 1) + ("fsdp_hidden",) if columns else ()
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    split = jax.tree_util.tree_map_with_path(place, variables)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, split["params"]["target"])
    generate = jax.jit(lambda v: model.apply(v, HALF, method="generate"), out_shardings=shardings)
    compiled = generate.lower(split).compile()
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", compiled.as_text())
    for got, wanted in zip(
        jax.tree.leaves(compiled(split)), jax.tree.leaves(model.apply(variables, HALF, method="generate")), strict=True
    ):
        assert got.addressable_shards[0].data.size == got.size // 8
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    whole = jax.jit(lambda v: jnp.sum(jnp.sin(model.apply(v, HALF, X)))).lower(split).compile()
    sizes = [
        int(np.prod([int(n) for n in s.split(",")]))
        for s in re.findall(r"= f32\[([\d,]+)\]\S* all-gather", whole.as_text())
    ]
    assert all(size <= 64 * 64 for size in sizes)  # activations and at most one kernel, never a head of 128 of them


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = nn.relu(nn.Dense(1000, use_bias=False, name=f"dense_{index}")(x))
        return x


def temporary(fn, *args) -> int:
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.breadth  # the other tests of this file
def test_three_million_parameters_in_chunks_train_in_twice_the_targets_memory():
    net, x = Wide(), jax.ShapeDtypeStruct((4, 1000), jnp.float32)
    spec = hyper.spec(net, x)
    assert spec.size == 3_000_000
    total = {}
    for name, chunk in (("small", 4096), ("large", 65536)):
        model = hyper.Hyper(net, hyper.mip(spec, hidden=(16, 64), head="chunked", chunk_size=chunk))
        variables = jax.eval_shape(model.init, KEY, HALF, x)
        loss = lambda v, x, model=model: jnp.sum(jnp.square(model.apply(v, HALF, x)))
        step = jax.jit(
            lambda v, x, loss=loss: jax.tree.map(lambda p, g: p - g, v, jax.grad(loss)(v, x)), donate_argnums=0
        )
        memory = step.lower(variables, x).compile().memory_analysis()
        total[name] = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    plain = jax.eval_shape(net.init, KEY, x)
    loss = lambda v, x: jnp.sum(jnp.square(net.apply(v, x)))
    step = jax.jit(lambda v, x: jax.tree.map(lambda p, g: p - g, v, jax.grad(loss)(v, x)), donate_argnums=0)
    memory = step.lower(plain, x).compile().memory_analysis()
    target = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    head = 64 * 4096 * 4
    assert total["small"] <= 2 * target + 4 * head
    assert total["large"] > total["small"]


def test_remat_changes_no_number(monkeypatch):
    spec = hyper.spec(MLP(), X, select="out/kernel")
    network = hyper.mip(spec, hidden=(8,), head="chunked", chunk_size=50)
    params = started(network)

    def run():
        loss = lambda params: sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(network.apply(params, HALF)))
        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        return "remat" in str(traced.jaxpr), traced.lower().compile()(params)

    rematerialized, (value, gradient) = run()
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
    stored, (plain, wanted) = run()
    assert (rematerialized, stored) == (True, False)
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    for got, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)
