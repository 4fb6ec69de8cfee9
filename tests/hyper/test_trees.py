"""Parameters whose keys contain '/', in trees of any containers, of odd sizes and kinds."""

import copy
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat import hyper
from seqboat.parallel.rules import Layout, Rules
from seqboat.paths import Path, flatten, path_keys, unflatten

X, AT = jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.array([0.3])


class Normed(nn.Module):
    """Flax names the scale of the kernel "Dense_0/kernel/scale", one key."""

    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(2))(nn.tanh(nn.Dense(4, name="first")(x)))


class Pair(NamedTuple):
    rate: jax.Array
    shift: jax.Array


class Odd(nn.Module):
    """A tuple, a list, a named tuple, a scalar, nothing, and a count of steps."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal()
        both = self.param("both", lambda key: (normal(key, (3, 2)), [normal(key, (2,)), normal(key, ())]))
        pair = self.param("pair", lambda key: Pair(normal(key, (2,)), normal(key, ())))
        gain = self.param("gain", nn.initializers.ones, ())
        nothing = self.param("nothing", normal, (0, 2))
        steps = self.param("steps", lambda _: jnp.full((), 3))
        assert isinstance(both, tuple)
        assert isinstance(pair, Pair)
        y = gain * (x @ both[0] + both[1][0][None] + both[1][1]) + nothing.sum()
        return jnp.tanh(pair.rate[None] * y + pair.shift) * steps


TARGETS = {
    "inside": (Normed(), {}, "WeightNorm_0/Dense_0/kernel/scale"),
    "a leaf below the name of another": (nn.WeightNorm(nn.Dense(4)), {}, "layer_instance/kernel/scale"),
    "containers": (Odd(), {"exclude": "steps"}, "both/1/0"),
}


FIELDS = {"": {}, "low_rank": {"head": "low_rank"}, "chunked": {"head": "chunked", "residual": False}}


# test_names_keep_their_keys; test_network.py: test_every_head_generates_what_the_target_computes_with
@pytest.mark.breadth
@pytest.mark.parametrize(
    ("target", "options", "path", "fields"),
    [(*TARGETS[one], FIELDS[two]) for one in TARGETS for two in FIELDS],
    ids=[f"{one}, {two}" for one in TARGETS for two in FIELDS],
)
def test_a_target_computes_with_what_is_generated_for_its_own_tree(target, options, path, fields):
    spec = hyper.spec(target, X, **options)
    assert spec[path].path == path
    model = hyper.Hyper(target, hyper.mip(spec, hidden=(4,), chunk_size=8, **fields))
    variables = jax.jit(model.init)(jax.random.key(0), AT, X)
    bound = jax.jit(lambda variables: hyper.bind(model, variables, AT))(variables)
    own = jax.eval_shape(target.init, jax.random.key(0), X)
    assert jax.tree.structure(bound["params"]) == jax.tree.structure(own["params"])
    apply = jax.jit(model.apply)
    y = apply(variables, AT, X)
    np.testing.assert_array_equal(y, jax.jit(target.apply)(bound, X))
    assert (np.asarray(y) != apply(variables, 2 * AT, X)).any()
    gradient = jax.grad(lambda params: model.apply({**variables, "params": params}, AT, X).sum(), allow_int=True)
    assert len(jax.tree.leaves(jax.eval_shape(gradient, variables["params"]))) == len(
        jax.tree.leaves(variables["params"])
    )


def test_leaves_without_numbers_stay_as_they_are():
    spec = hyper.spec(Odd(), X, exclude="steps")
    assert set(spec.others) == {"nothing", "steps"}
    with pytest.raises(ValueError, match="leaves nothing to generate"):
        hyper.spec(Odd(), X, select="nothing")
    with pytest.raises(ValueError, match=r"steps \(\) is of int32"):
        hyper.spec(Odd(), X)


@pytest.mark.breadth  # test_names_keep_their_keys; test_network.py: test_partitioned_parameters_keep_their_names
def test_a_trained_target_with_odd_keys_starts_a_hypernetwork():
    own = jax.jit(Normed().init)(jax.random.key(1), X)
    model = hyper.Hyper(Normed(), hyper.mip(hyper.spec(Normed(), X), init="zero"))
    started = hyper.start_from(jax.jit(model.init)(jax.random.key(0), AT, X), own)
    np.testing.assert_array_equal(jax.jit(model.apply)(started, AT, X), jax.jit(Normed().apply)(own, X))


def test_names_keep_their_keys():
    tree = {"a/b": {"c": 1}, "a": {"b": {"d/e": 2}}, "list": [3, (4,)]}
    leaves = flatten(tree)
    assert leaves == {"a/b/c": 1, "a/b/d/e": 2, "list/0": 3, "list/1/0": 4}
    assert unflatten(leaves) == {"a/b": {"c": 1}, "a": {"b": {"d/e": 2}}, "list": {"0": 3, "1": {"0": 4}}}
    name = next(iter(leaves))
    assert name.keys == copy.deepcopy(name).keys == ("a", "b", "d/e")
    assert path_keys("a/b/c") == ("a", "b", "c") == Path(("a", "b", "c")).keys
    with pytest.raises(ValueError, match="a/b: two leaves have this name"):
        flatten({"a/b": 1, "a": {"b": 2}})


def test_rules_split_parameters_with_odd_keys():
    params = jax.eval_shape(nn.WeightNorm(nn.Dense(4)).init, jax.random.key(0), X)["params"]
    rules = Rules(parameters=(("kernel/scale", (None,)), ("kernel", ("embed", None)), ("bias", (None,))))
    specs = flatten(Layout(rules, (("fsdp", 3),)).of_parameters(params))
    assert {re.sub(".*instance", "", path): tuple(spec) for path, spec in specs.items()} == {
        "/kernel": ("fsdp", None),
        "/kernel/scale": (None,),
        "/bias": (None,),
    }
