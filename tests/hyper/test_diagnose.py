"""The diagnosis says what is known of the default and of MIP; drift and importance in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat import hyper
from seqboat.hyper import continual
from tests.helpers import random_like
from tests.hyper.targets import MLP, X

NET, KEY = MLP(), jax.random.key(0)
GRID = jnp.linspace(0.01, 1, 25)[:, None]


@functools.cache
def spec():
    return hyper.spec(NET, X, draws=64)


def diagnose(residual, kind):
    config = hyper.HyperConfig(encoding=hyper.Encoding(kind), residual=residual, hidden=(64,))
    model = hyper.Hyper(NET, hyper.HyperNetwork(spec(), config))
    variables = jax.jit(model.init)(KEY, GRID[0], X)
    return hyper.diagnose(model, variables, GRID, lambda v, z: jnp.sum(jnp.square(model.apply(v, z, X))))


def test_the_default_is_proportional_and_mip_is_not():
    default, mip = diagnose(False, "none"), diagnose(True, "cos_sin")
    assert abs(default.slope - 1) < 1e-4
    assert 99 < default.spread < 101
    assert default.rank < 1e-5
    assert np.isnan(default.perturbation)
    assert mip.spread < 2
    assert abs(mip.slope) < 0.2
    assert mip.rank > 0.01
    assert 0 < mip.perturbation < 10
    assert mip.gradient_variation < default.gradient_variation
    kernels = {path: ratio for path, ratio in mip.std_ratio.items() if path.endswith("kernel")}
    assert set(kernels) == {"dense_0/kernel", "dense_1/kernel", "out/kernel"}
    assert all(0.9 < ratio < 4 for ratio in kernels.values())


def test_drift_is_zero_with_zero_gradient_at_a_tasks_start_and_exact_for_linear_heads():
    encoding = hyper.Encoding("embedding", tasks=3, size=4)
    model = hyper.Hyper(NET, hyper.mip(spec(), encoding=encoding, hidden=(8,)))
    variables = random_like(jax.eval_shape(model.init, KEY, jnp.array([0]), X))
    tasks = jnp.arange(2)[:, None]
    before = jax.jit(lambda v: continual.generate_tasks(model, v, tasks))(variables)

    @jax.jit
    def run(v, weight):
        loss = lambda v: continual.drift(continual.generate_tasks(model, v, tasks), before)
        weighted = continual.drift(continual.generate_tasks(model, v, tasks), before, weight)
        return *jax.value_and_grad(loss)(v), weighted

    ones = jax.tree.map(jnp.ones_like, before)
    value, gradient, _ = run(variables, ones)
    assert value == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    # Only the head moves, and theta is linear in it: sum (h dA)^2, a mean over both tasks.
    kernel = variables["params"]["network"]["full"]["kernel"]["out"]["kernel"]
    step = jax.random.normal(KEY, kernel.shape)
    moved = jax.tree.map(lambda a: a, variables)
    moved["params"]["network"]["full"]["kernel"]["out"]["kernel"] = kernel + step
    trunk = {"params": {**variables["params"]["network"]}}
    hidden = jax.jit(jax.vmap(lambda task: _hidden(model, trunk, task)))(tasks)
    wanted = jnp.mean(jnp.sum(jnp.square(jnp.einsum("th,hio->tio", hidden, step)), (1, 2)))
    loss, _, weighted = run(moved, ones)
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    np.testing.assert_allclose(weighted, loss, rtol=1e-6)
    np.testing.assert_allclose(run(moved, jax.tree.map(lambda a: 3 * a, ones))[2], 3 * loss, rtol=1e-6)


def _hidden(model, trunk, task):
    """What the head multiplies, by a head of the identity."""
    spec = hyper.spec(NET, X, select="out/bias")
    narrow = hyper.HyperNetwork(spec, model.network.config)
    width = model.network.config.hidden[-1]
    kernels = jnp.zeros((width, width, 5)).at[np.arange(width), np.arange(width), 0].set(1)
    head = lambda kernel: {**trunk["params"], "full": {"kernel": {"out": {"bias": kernel}}}}
    return jax.vmap(lambda kernel: narrow.apply({"params": head(kernel)}, task)["out/bias"][0])(kernels)


def test_importance_is_the_mean_squared_gradient_with_mean_one():
    params, xs = {"w": jnp.array([1.0, 2.0, 0.0])}, jnp.array([[1.0, 0, 0], [3.0, 1, 0]])
    gradient = lambda params, x: jax.grad(lambda p: jnp.vdot(p["w"], x))(params)
    found = continual.importance(gradient, params, xs)["w"]
    wanted = np.array([5.0, 0.5, 0.0])
    np.testing.assert_allclose(found, wanted / wanted.mean(), rtol=1e-6)


@pytest.mark.breadth  # test_the_default_is_proportional_and_mip_is_not
def test_a_grown_generator_generates_the_same_and_learns_with_its_new_units():
    network = hyper.mip(hyper.spec(NET, X, select="out/kernel"), hidden=(6,), head="recurrent", chunk_size=50)
    condition = jnp.array([0.3])
    params = random_like(jax.eval_shape(network.init, KEY, condition))["params"]
    larger, grown = continual.grow(network, params, 3, jax.random.key(1))

    @jax.jit
    def run(params, grown):
        loss = lambda p: sum(jnp.sum(jnp.sin(a)) for a in larger.apply({"params": p}, condition).values())
        before, after = (net.apply({"params": own}, condition) for net, own in ((network, params), (larger, grown)))
        return before, after, jax.grad(loss)(grown)

    before, after, gradient = run(params, grown)
    for path, leaf in before.items():
        np.testing.assert_allclose(after[path], leaf, rtol=1e-6, atol=1e-7)
    assert grown["recurrent"]["kernel"].shape == (9, 50)
    gradient = gradient["recurrent"]
    assert np.any(gradient["kernel"][6:])
    assert np.any(gradient["lstm"]["hi"]["kernel"][6:, :6])
    with pytest.raises(ValueError, match="only a network with recurrent heads only can grow; this one has full"):
        continual.grow(hyper.mip(spec()), params, 3, KEY)
    with pytest.raises(ValueError, match="units=0"):
        continual.grow(network, params, 0, KEY)
