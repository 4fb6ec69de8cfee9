"""Which parameters are generated, and what is known of them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat import hyper
from seqboat.layers.mixers.ema import EMA
from tests.hyper.targets import LENGTHS, MLP, TARGETS, TOKENS, Tied, X, classifier

NET = MLP(norm=True)


def paths(select, **kwargs) -> set[str]:
    return {leaf.path for leaf in hyper.spec(NET, X, select=select, **kwargs)}


def test_globs_regular_expressions_and_predicates_select():
    kernels = {"dense_0/kernel", "dense_1/kernel", "out/kernel"}
    assert (
        paths("**/kernel") == paths(re.compile("kernel$")) == paths(lambda path, leaf: len(leaf.shape) == 2) == kernels
    )
    assert paths("dense_?/*") == {"dense_0/kernel", "dense_0/bias", "dense_1/kernel", "dense_1/bias"}
    assert paths("out/**") == {"out/kernel", "out/bias"}
    assert paths("**", exclude=("norm_*/*", "**/bias")) == kernels
    assert paths(["out/kernel", "norm_0/scale"]) == {"out/kernel", "norm_0/scale"}


def test_a_spec_computes_nothing():
    huge = hyper.spec(MLP(hidden=(10**6, 10**6)), jax.ShapeDtypeStruct((1, 10**6), jnp.float32))
    assert huge.size > 2 * 10**12
    assert huge["dense_1/kernel"].shape == (10**6, 10**6)


def test_roles_and_fans():
    spec = hyper.spec(TARGETS["conv"][0], *TARGETS["conv"][1])
    kernel, bias = spec["conv_0/kernel"], spec["conv_0/bias"]
    assert (kernel.role, kernel.fan_in, kernel.fan_out) == ("kernel", 3 * 3, 3 * 8)
    assert (bias.role, bias.fan_in, bias.fan_out) == ("bias", 3 * 3, 3 * 8)
    assert spec.kernel_of(bias) == kernel
    assert spec.bias_of(kernel) == bias
    stack = hyper.spec(classifier(), TOKENS, LENGTHS, stacked="encoder/layers/**")[
        "encoder/layers/skip_projection/kernel"
    ]
    assert (stack.shape, stack.fan_in, stack.fan_out) == ((2, 8, 8), 8, 8)
    assert hyper.spec(NET, X)["norm_0/bias"].role == "other"


@pytest.mark.breadth  # test_roles_and_fans
def test_measured_moments():
    spec = hyper.spec(NET, X, draws=64)
    assert spec["norm_0/scale"].mean == 1
    assert spec["norm_0/scale"].variance == 0
    assert abs(spec["dense_0/kernel"].variance * 12 - 1) < 0.1  # lecun_normal: 1 / fan_in
    assert abs(spec["dense_0/kernel"].mean) < 0.01
    module, args, _ = TARGETS["s4d"]
    rates = hyper.spec(module, *args, select="ssm/frequency", draws=8)["ssm/frequency"]
    assert rates.variance == 0
    assert rates.mean.shape == rates.shape
    own = jax.jit(module.init)(jax.random.key(3), *args)["params"]["ssm"]["frequency"]
    np.testing.assert_array_equal(rates.mean, own)
    # An EMA's beta is +-1 in turn and a little noise: the signs are structure, the noise is its variance.
    ema, inputs = EMA(4, True), (jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool))
    beta = hyper.spec(ema, *inputs, select="beta", draws=64)["beta"]
    assert set(np.round(np.unique(beta.mean), 1)) == {-1, 1}
    assert beta.variance < 0.001


@pytest.mark.breadth  # tests/hyper/test_network.py: every head
def test_a_tied_parameter_is_one_leaf_that_is_generated_once():
    tokens = jnp.arange(4)[None]
    spec = hyper.spec(Tied(), tokens)
    assert {leaf.path for leaf in spec} == {"embedding/embedding", "dense/kernel", "dense/bias"}
    model, condition = hyper.Hyper(Tied(), hyper.mip(spec)), jnp.array([0.3])
    variables = model.init(jax.random.key(0), condition, tokens)
    plain = Tied().apply(hyper.bind(model, variables, condition), tokens)
    np.testing.assert_array_equal(model.apply(variables, condition, tokens), plain)


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("steps", lambda _: jnp.zeros((), jnp.int32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hyper.spec(NET, X, select="**/kernal"),
            r"select='\*\*/kernal' matches no parameter; there are dense_0",
        ),
        (lambda: hyper.spec(NET, X, exclude="head/*"), r"exclude='head/\*' matches no parameter"),
        (lambda: hyper.spec(NET, X, select="out/*", exclude="out/**"), "leaves nothing to generate"),
        (lambda: hyper.spec(NET, X, select=()), "leaves nothing to generate"),
        (lambda: hyper.spec(NET, X, draws=1), "draws=1: a variance takes at least 2"),
        (lambda: hyper.spec(Counter(), X), r"steps \(\) is of int32: .* exclude it"),
        (lambda: hyper.spec(nn.Dropout(0.5, deterministic=True), X), "Dropout has no parameters"),
    ],
)
def test_errors_name_path_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
