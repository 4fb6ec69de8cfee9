"""What hypernetworks do at their start, against formulas: each test has its number.

Variances are over draws of the hypernetwork: means over many networks, within four standard errors or a stated share.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat import hyper
from seqboat.hyper.heads import Trunk, initial_variance
from seqboat.paths import flatten
from tests.helpers import grid
from tests.hyper.targets import MLP, TARGETS, X

NET = MLP()
RAW = hyper.Encoding("none")


@functools.cache
def plain_spec():
    return hyper.spec(NET, X)


def network(spec=None, **fields) -> hyper.HyperNetwork:
    config = hyper.HyperConfig(**{"hidden": (16, 64, 128), "residual": False, **fields})
    return hyper.HyperNetwork(plain_spec() if spec is None else spec, config)


def generated(net: hyper.HyperNetwork, conditions, seed=0) -> np.ndarray:
    """(K, m): everything one network generates for each of K hyper-inputs."""

    @jax.jit
    def every(key):
        variables = net.init(key, conditions[0])
        return jax.vmap(lambda z: net.apply(variables, z))(conditions)

    return np.concatenate(
        [np.asarray(leaf).reshape(len(conditions), -1) for leaf in jax.tree.leaves(every(jax.random.key(seed)))], 1
    )


# test_diagnose.py: test_the_default_is_proportional_and_mip_is_not
@pytest.mark.parametrize("slope", grid((0.0, 0.01)))
def test_the_default_is_homogeneous_of_degree_one(slope):
    with jax.enable_x64(True):
        z = jnp.array([[0.2, 0.7, 0.1]])
        encoding = hyper.Encoding("none", inputs=3)
        one = generated(network(encoding=encoding, negative_slope=slope), jnp.concatenate([z, 0.3 * z]))
    np.testing.assert_allclose(one[1], 0.3 * one[0], rtol=1e-12, atol=1e-15)


@pytest.mark.breadth  # test_diagnose.py: test_the_default_is_proportional_and_mip_is_not
def test_mip_is_not_homogeneous():
    rows = generated(network(), jnp.array([[0.25], [0.5]]))
    assert np.abs(rows[1] - 2 * rows[0]).max() > 0.1 * np.abs(rows).max()


@pytest.mark.breadth  # test_diagnose.py: test_the_default_is_proportional_and_mip_is_not
def test_weights_of_a_scalar_input_lie_on_one_ray_and_encoded_ones_do_not():
    conditions = jnp.linspace(0.05, 1, 12)[:, None]
    ratios = [_second_singular(generated(network(encoding=e), conditions)) for e in (RAW, hyper.Encoding())]
    assert ratios[0] < 1e-6  # float32
    assert ratios[1] > 0.05


def _second_singular(rows):
    singular = np.linalg.svd(rows, compute_uv=False)
    return singular[1] / singular[0]


@pytest.mark.breadth  # test_mip_starts_as_a_perturbation_of_inputs_over_fan_out; test_diagnose.py
def test_the_gradient_of_the_head_is_linear_in_a_scalar_input():
    net, target = network(encoding=RAW), jax.random.normal(jax.random.key(3), (plain_spec().size,))
    variables = jax.jit(net.init)(jax.random.key(0), jnp.ones(1))

    def loss(params, z):  # linear in theta
        return jnp.vdot(target, jnp.concatenate([a.ravel() for a in jax.tree.leaves(net.apply({"params": params}, z))]))

    norms, gradient_of = [], jax.jit(jax.grad(loss))
    for z in (0.25, 0.5, 1.0):
        gradient = gradient_of(variables["params"], jnp.array([z]))["full"]["kernel"]
        norms.append(float(jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))))
    np.testing.assert_allclose(np.array(norms) / norms[0], [1, 2, 4], rtol=1e-5)


@pytest.mark.breadth  # test_mip_starts_as_a_perturbation_of_inputs_over_fan_out
@pytest.mark.parametrize("width", grid((1, 2, 8), 2))
def test_the_trunk_keeps_the_expected_squared_norm(width):
    encoding = hyper.Encoding(inputs=width)
    trunk = Trunk(hyper.HyperConfig(encoding=encoding))
    code = encoding(jnp.linspace(0.1, 0.9, width))

    def squared(key):
        return jnp.sum(jnp.square(trunk.apply(trunk.init(key, code), code)))

    found = np.asarray(jax.jit(jax.vmap(squared))(jax.random.split(jax.random.key(0), 400)))
    assert abs(found.mean() - width) < 4 * found.std() / 20  # E|h|^2 = |E(z)|^2 = M


def test_mip_starts_as_a_perturbation_of_inputs_over_fan_out():
    """E|delta|^2 / E|theta0|^2 = M / fan_out for kernels of He's fan-in variance with the trunk's own gain."""
    wide = hyper.spec(MLP((16, 16)), X, select="dense_1/kernel")
    net = network(wide, residual=True, hidden=(32,))
    condition = jnp.array([0.4])

    def squared(key):
        return jnp.sum(jnp.square(net.apply(net.init(key, condition), condition)["dense_1/kernel"]))

    found = np.asarray(
        jax.jit(lambda keys: jax.lax.map(squared, keys, batch_size=50))(jax.random.split(jax.random.key(1), 400))
    )
    he = net.config.gain / 16 * wide.size  # E|theta0|^2 = (gain / fan_in) fan_in fan_out
    ratio, error = found.mean() / he, found.std() / 20 / he
    assert abs(ratio - 1 / 16) < 4 * error


@pytest.mark.breadth  # test_diagnose.py: test_the_default_is_proportional_and_mip_is_not
def test_gradients_vary_over_the_input_as_one_over_root_three():
    """A norm linear in z ~ U(0, 1) has the coefficient of variation 1 / sqrt(3) = 0.577."""
    net, direction = network(encoding=RAW), jax.random.normal(jax.random.key(3), (plain_spec().size,))
    model = hyper.Hyper(NET, net)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones(1), X)

    def loss(variables, z):
        theta = model.apply(variables, z, method="generate")
        return jnp.vdot(direction, jnp.concatenate([a.ravel() for a in jax.tree.leaves(theta)]))

    # Stratified uniform inputs; the trunk's biases, whose gradient does not grow with z, have no part.
    def without_biases(variables, z):
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jax.lax.stop_gradient(leaf) if path[-1].key == "bias" or path[1].key == "offset" else leaf
            ),
            variables["params"],
        )
        return loss({"params": params}, z)

    conditions = (jnp.arange(64)[:, None] + 0.5) / 64
    found = hyper.diagnose(model, variables, conditions, without_biases)
    assert abs(found.gradient_variation - 3**-0.5) < 1e-3
    assert abs(found.slope - 1) < 1e-5
    assert found.rank < 1e-6


@pytest.mark.breadth  # test_diagnose.py: test_the_default_is_proportional_and_mip_is_not
def test_mip_keeps_the_size_of_weights_over_the_whole_range():
    conditions = jnp.linspace(0, 1, 33)[:, None]
    spreads, model = [], hyper.Hyper(NET, hyper.mip(plain_spec()))
    init = jax.jit(model.init)
    for seed in range(5):
        variables = init(jax.random.key(seed), conditions[0], X)
        spreads.append(hyper.diagnose(model, variables, conditions).spread)
    assert max(spreads) < 2


KINDS = ("hyperfan_in", "hyperfan_out", "hyperfan_harmonic")


def _variances(name: str, draws: int = 800) -> dict[str, tuple[dict[str, float], hyper.Spec]]:
    """Of each init: the variance of every kernel and bias over draws of a wide one-layer hypernetwork."""
    module, args, stacked = TARGETS[name]
    every = hyper.spec(module, *args, stacked=stacked)
    chosen = [leaf.path for leaf in every if leaf.role == "kernel"]
    chosen += [leaf.path for leaf in every if leaf.role == "bias" and every.kernel_of(leaf).path in chosen]
    spec = hyper.spec(module, *args, stacked=stacked, select=lambda path, leaf: path in chosen)
    condition, found = jnp.array([0.3]), {}
    for init in KINDS:
        net = network(spec, init=init, hidden=(256,))

        def squares(key, net=net):
            out = net.apply(net.init(key, condition), condition)
            return {path: jnp.mean(jnp.square(delta)) for path, delta in out.items()}

        means = jax.jit(lambda keys, f=squares: jax.lax.map(f, keys))(jax.random.split(jax.random.key(2), draws))
        found[init] = {path: float(mean.mean()) for path, mean in means.items()}, spec
    return found


SLOW = [pytest.param(name, marks=pytest.mark.slow if name != "s4d" else ()) for name in TARGETS]


@pytest.mark.breadth
@pytest.mark.parametrize("name", SLOW)
def test_hyperfan_variances(name):
    """After ReLU. Kernels: 2 / fan_in (half where the bias is generated), 2 / fan_out, their harmonic mean; biases: 1,
    2 (1 - fan_in / fan_out). Within 5 %, of every leaf with at least 16 numbers."""
    checked = 0
    found = _variances(name)
    for path in found["hyperfan_in"][0]:
        spec = found["hyperfan_in"][1]
        leaf = spec[path]
        if leaf.size < 16:
            continue
        into, out = leaf.fan_in, leaf.fan_out
        if leaf.role == "kernel":
            forward, backward = (1 if spec.bias_of(leaf) else 2) / into, 2 / out
        else:
            forward, backward = 1.0, max(0.0, 2 * (1 - into / out))
        harmonic = 2 / (1 / forward + 1 / backward) if backward else 0.0
        for init, wanted in zip(KINDS, (forward, backward, harmonic), strict=True):
            got = found[init][0][path]
            assert abs(got - wanted) <= 0.05 * wanted, (path, init, got, wanted)
            checked += 1
    assert checked >= 3


@pytest.mark.breadth  # test_mip_starts_as_a_perturbation_of_inputs_over_fan_out
def test_hyperfan_with_generated_biases_keeps_the_second_moment():
    """E[relu(y)^2] = E[x^2] for y = W x + b, W and b generated."""
    net = network(hyper.spec(MLP((), 64), X), init="hyperfan_in", hidden=(32,))
    condition = jnp.array([0.6])
    x = jax.random.normal(jax.random.key(9), (64, X.shape[1]))

    def moment(key):
        out = net.apply(net.init(key, condition), condition)
        y = x @ out["out/kernel"] + out["out/bias"][None]
        return jnp.mean(jnp.square(jnp.maximum(y, 0)))

    found = np.asarray(jax.jit(lambda keys: jax.lax.map(moment, keys))(jax.random.split(jax.random.key(4), 300)))
    assert abs(found.mean() / float(jnp.mean(x**2)) - 1) < 4 * found.std() / 300**0.5


@pytest.mark.breadth
@pytest.mark.parametrize("name", SLOW)
def test_every_leaf_starts_with_its_own_initializers_deviation(name):
    """Within 5 %, of any initializer; leaves that its initializer does not draw start exactly as it makes them."""
    module, args, stacked = TARGETS[name]
    spec = hyper.spec(module, *args, stacked=stacked, draws=400)
    net = network(spec, init="matched", hidden=(256,))
    condition = jnp.array([0.3])

    deltas = jax.jit(lambda keys: jax.lax.map(lambda key: net.apply(net.init(key, condition), condition), keys))(
        jax.random.split(jax.random.key(5), 256)
    )
    own = flatten(jax.jit(module.init)(jax.random.key(0), *args)["params"])
    for leaf in spec:
        values = np.asarray(deltas[leaf.path], np.float64)
        if leaf.variance == 0:
            assert values.std(0).max() == 0
            np.testing.assert_allclose(values[0], own[leaf.path], rtol=1e-6)
        elif leaf.size >= 16:
            ratio = np.sqrt(np.square(values - leaf.mean).mean() / leaf.variance)
            assert abs(ratio - 1) < 0.05, (leaf.path, ratio)


def test_harmonic_lies_between_its_parts():
    """The mean 2 / (1 / v_in + 1 / v_out), not of the reciprocals: hypnettorch 0.0.4 takes the latter."""
    spec = hyper.spec(MLP((50,), use_bias=False), jnp.ones((1, 100)), select="dense_0/kernel")
    config = hyper.HyperConfig(init="hyperfan_in", residual=False)
    found = [initial_variance(spec["dense_0/kernel"], spec, dataclasses.replace(config, init=init)) for init in KINDS]
    np.testing.assert_allclose(found, [2 / 100, 2 / 50, 4 / 150], rtol=1e-12)
