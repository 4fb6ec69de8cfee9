"""Norms against plain numpy in float64; batch norm's statistics, running and across devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BF16, assert_close, grid, normal, value_and_vjp

from seqboat.layers.norm import NORMS, BatchNorm

BATCH, LENGTH, D = 4, 7, 6
VALID = jnp.arange(LENGTH)[None] < jnp.array([7, 3, 0, 1])[:, None]
EPSILON = 1e-5


def inputs():
    return 2 * normal(0, BATCH, LENGTH, D) + 1


def parameters(kind):
    scale, offset = 1 + normal(1, D) / 2, normal(2, D)
    return {"scale": {"scale": scale[0]}, "rms": {"scale": scale}}.get(kind, {"scale": scale, "offset": offset})


def numpy_norm(kind, x, params):
    x, params = np.asarray(x, np.float64), {name: np.asarray(value, np.float64) for name, value in params.items()}
    if kind in ("scale", "rms"):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * params["scale"]
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    return y * params["scale"] + params["offset"]


@pytest.mark.parametrize("kind", ["layer", "scale", "rms"])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_over_the_width(kind, affine):
    params = parameters(kind) if affine else {}
    module = NORMS[kind](affine=affine)
    expected = numpy_norm(kind, inputs(), params if affine else {"scale": 1.0, "offset": 0.0})
    assert_close(module.apply({"params": params}, inputs(), VALID, True), expected)
    half = module.apply({"params": params}, inputs().astype(jnp.bfloat16), VALID, False)
    assert half.dtype == jnp.bfloat16
    assert_close(half, expected, BF16)
    created = jax.eval_shape(functools.partial(module.init, train=True), jax.random.key(0), inputs(), VALID)
    assert {name: leaf.shape for name, leaf in created.get("params", {}).items()} == {
        name: value.shape for name, value in params.items()
    }


@pytest.mark.parametrize("kind", NORMS)
def test_a_constant_zero_has_finite_gradients(kind):
    module, zeros = NORMS[kind](affine=False), jnp.zeros((2, 3, D))
    statistics = {"batch_stats": {"mean": jnp.zeros(D), "variance": jnp.zeros(D)}} if kind == "batch" else {}
    apply = lambda x: module.apply(statistics, x, jnp.ones((2, 3), bool), True, mutable=["batch_stats"])[0]
    value, (gradient,) = value_and_vjp(apply)(normal(3, 2, 3, D), zeros)
    assert not np.asarray(value).any()
    assert np.isfinite(gradient).all()


def batch_norm(train, *, count_padding=False, x=None, statistics=None, valid=VALID):
    module = BatchNorm(count_padding=count_padding)
    statistics = {"mean": jnp.zeros(D), "variance": jnp.ones(D)} if statistics is None else statistics
    variables = {"params": parameters("batch"), "batch_stats": statistics}
    y, changed = module.apply(variables, inputs() if x is None else x, valid, train, mutable=["batch_stats"])
    return y, changed["batch_stats"]


@pytest.mark.parametrize("count_padding", [False, True])
def test_batch_norm_takes_its_statistics_over_what_it_should(count_padding):
    x, params = np.asarray(inputs(), np.float64), parameters("batch")
    counted = x.reshape(-1, D) if count_padding else x[np.asarray(VALID)]
    mean, variance = counted.mean(0), counted.var(0)
    y, statistics = batch_norm(True, count_padding=count_padding)
    plain = (x - mean) / np.sqrt(variance + EPSILON)
    assert_close(y, plain * np.asarray(params["scale"], np.float64) + np.asarray(params["offset"], np.float64))
    assert_close(statistics, {"mean": 0.1 * mean, "variance": 0.9 + 0.1 * counted.var(0, ddof=1)})


def test_padding_changes_nothing_unless_it_is_counted():
    noisy = jnp.where(VALID[..., None], inputs(), 100.0)
    (y, statistics), (other, others) = batch_norm(True), batch_norm(True, x=noisy)
    assert_close((other[VALID], others), (y[VALID], statistics))
    counted = batch_norm(True, x=noisy, count_padding=True)[1]
    assert np.abs(counted["mean"] - statistics["mean"]).max() > 1


def test_running_statistics_follow_batch_after_batch_and_rule_in_evaluation():
    statistics, mean, variance = None, np.zeros(D), np.ones(D)
    for seed in range(3):
        x = normal(seed, BATCH, LENGTH, D)
        _, statistics = batch_norm(True, x=x, statistics=statistics)
        counted = np.asarray(x, np.float64)[np.asarray(VALID)]
        mean, variance = 0.9 * mean + 0.1 * counted.mean(0), 0.9 * variance + 0.1 * counted.var(0, ddof=1)
    assert_close(statistics, {"mean": mean, "variance": variance})
    y, unchanged = batch_norm(False, statistics=statistics)
    assert_close(unchanged, statistics)
    params = {name: np.asarray(value, np.float64) for name, value in parameters("batch").items()}
    plain = (np.asarray(inputs(), np.float64) - mean) / np.sqrt(variance + EPSILON)
    assert_close(y, plain * params["scale"] + params["offset"])


def test_a_batch_without_elements_leaves_finite_numbers():
    y, statistics = batch_norm(True, valid=jnp.zeros_like(VALID))
    assert np.isfinite(y).all()
    assert_close(statistics, {"mean": np.zeros(D), "variance": 0.9 * np.ones(D)})


def test_initialisation_does_not_count_as_a_batch():
    variables = BatchNorm().init(jax.random.key(0), inputs(), VALID, True)
    assert_close(variables["batch_stats"], {"mean": np.zeros(D), "variance": np.ones(D)})


@pytest.mark.parametrize("partitioner", grid(("shard_map", "pmap"), "shard_map"))
def test_two_devices_have_the_statistics_of_one(partitioner):
    """Outputs, statistics and gradients of a batch whose halves hold different numbers of real elements."""
    variables = {"params": parameters("batch"), "batch_stats": {"mean": jnp.zeros(D), "variance": jnp.ones(D)}}
    cotangent = jnp.where(VALID[..., None], normal(5, BATCH, LENGTH, D), 0)

    def apply(axes, x, valid):
        return BatchNorm(axes=axes).apply(variables, x, valid, True, mutable=["batch_stats"])

    def split(x, valid):
        if partitioner == "shard_map":
            auto = (jax.sharding.AxisType.Auto,)
            mesh = jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])
            spec, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
            run = functools.partial(apply, ("data",))
            return jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, replicated))(x, valid)
        halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), (x, valid))
        y, changed = jax.pmap(functools.partial(apply, ("data",)), axis_name="data")(*halves)
        assert_close(changed, jax.tree.map(lambda leaf: leaf[::-1], changed))
        return y.reshape(x.shape), jax.tree.map(lambda leaf: leaf[0], changed)

    def with_gradient(run, compiler):
        def scalar(x):
            y, changed = run(x, VALID)
            return jnp.vdot(y, cotangent), (y, changed)

        return compiler(jax.grad(scalar, has_aux=True))(inputs())

    expected = with_gradient(functools.partial(apply, ()), jax.jit)
    assert_close(with_gradient(split, jax.jit if partitioner == "shard_map" else lambda f: f), expected)
