"""What sparse activation wants of modules that somebody else wrote, and what it hands on to them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, grid, normal, random_like

from seqboat import hyper
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer
from seqboat.layers.sparse_activation import SparseModularActivation
from seqboat.layers.windowed import WindowedModule
from seqboat.models.mlp import MLP, MLPConfig

D, T = 6, 8
M, VALID = normal(0, 1, T, D), jnp.ones((1, T), bool)


def make(*modules, **fields):
    return SparseModularActivation(modules, activation="always", block_size=4, **fields)


def initial(layer):
    return random_like(jax.eval_shape(layer.init, jax.random.key(0), M, VALID))


def run(layer, train=False, variables=None, m=M, **seeds):
    variables = initial(layer) if variables is None else variables
    rngs = {name: jax.random.key(seed) for name, seed in seeds.items()}
    return np.asarray(compiled(layer, train)(variables, m, rngs))


@functools.cache
def compiled(layer, train):
    return jax.jit(lambda variables, m, rngs: layer.apply(variables, m, VALID, train, rngs=rngs)[0])


class Returning(nn.Module):
    """Returns the result of a given function of the rows, or of a Dense layer of N columns."""

    make: object = None
    columns: int = D

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.columns)(x)
        return self.make(y) if self.make else y


class Windowed(WindowedModule):
    """Projects and mixes as it is told."""

    shown: object = lambda x: x
    mixed: object = lambda x: x

    def halo(self, length):
        return 1, 0

    def context(self, x, rows):
        return {"k": self.shown(x)}

    def mix(self, x, halo, rows, halo_rows):
        return self.mixed(x)


WRONG = {
    "one column": (Returning(columns=1, name="gate"), r"gate \(Returning\).* expected \(T, D\).* got \(4, 1\) float32"),
    "a vector": (Returning(lambda y: y[:, 0]), r"Returning.* got \(4,\) float32"),
    "fewer rows": (Returning(lambda y: y[:2]), r"Returning.* got \(2, 6\)"),
    "a batch": (Returning(lambda y: y[None]), r"Returning.* got \(1, 4, 6\)"),
    "integers": (Returning(lambda y: (y > 0).astype(int)), r"Returning.* got \(4, 6\) int32"),
    "complex": (Returning(lambda y: y + 1j), r"Returning.* got \(4, 6\) complex64"),
    "two results": (Returning(lambda y: (y, y)), r"Returning.* got a tuple"),
    "nothing": (Returning(lambda y: None), r"Returning.* got a NoneType"),
    "mixed": (Windowed(mixed=lambda x: x[:, :1], name="near"), r"near \(Windowed\).* mix .*got \(4, 1\)"),
    "shown": (Windowed(shown=lambda x: x[:1], name="near"), r"near \(Windowed\).* context .*T rows.* got \(1, 6\)"),
}


@pytest.mark.parametrize(("module", "message"), WRONG.values(), ids=WRONG)
def test_results_that_are_not_rows_are_refused_where_a_module_is_created(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make(module).init, jax.random.key(0), M, VALID)


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_results_that_are_not_rows_are_refused_where_a_module_is_applied(form):
    variables = jax.eval_shape(make(Returning(name="own")).init, jax.random.key(0), M, VALID)
    later = make(Returning(lambda y: y[:, :1], name="own"), form=form)
    with pytest.raises(ValueError, match=r"own \(Returning\).* got \(\d, 1\) float32"):
        jax.eval_shape(later.apply, variables, M, VALID)


def test_the_result_has_the_precision_of_the_rows():
    """A Dense layer without a dtype gives float32 of bfloat16."""
    y, _ = jax.eval_shape(make(Returning()).init_with_output, jax.random.key(0), M.astype(jnp.bfloat16), VALID)[0]
    assert y.dtype == jnp.bfloat16


class Train(nn.Module):
    """The usual form of a Flax module with dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5)(nn.Dense(D, use_bias=False, name="dense")(x), deterministic=not train)


class Deterministic(nn.Module):
    """Another usual form: a keyword without a default."""

    @nn.compact
    def __call__(self, x, *, deterministic):
        return nn.Dropout(0.5)(nn.Dense(D, use_bias=False, name="dense")(x), deterministic)


class TrainWindowed(WindowedModule):
    """A module with dropout of what neighbours see."""

    def setup(self):
        self.dense, self.drop = nn.Dense(D, use_bias=False), nn.Dropout(0.5)

    def halo(self, length):
        return 0, 0

    def context(self, x, rows, train):
        return self.drop(self.dense(x), deterministic=not train)

    def mix(self, x, halo, rows, halo_rows):
        return halo


@pytest.mark.parametrize("form", grid(("packed", "dense"), "packed"))
@pytest.mark.parametrize(
    "module",
    grid(
        {"train": Train(name="own"), "deterministic": Deterministic(name="own"), "windowed": TrainWindowed(name="own")},
        "windowed",
    ),
)
def test_whether_this_is_training_is_handed_on(module, form):
    layer = make(module, form=form)
    variables = initial(layer)
    first, again, other = (run(layer, True, variables, dropout=seed) for seed in (0, 0, 1))
    evaluated = run(layer, False, variables, dropout=0)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert_close(evaluated, M @ variables["params"]["own"]["dense"]["kernel"])
    assert_close(run(layer, False, variables), evaluated)
    # What is kept is doubled, the rest is zero; and no block of four rows drops what another does.
    kept = first != 0
    assert 0 < kept.mean() < 1
    assert_close(first[kept], 2 * evaluated[kept])
    if form == "packed" and not isinstance(module, WindowedModule):
        assert (kept[0, :4] != kept[0, 4:]).any()


def test_a_mode_that_a_module_has_as_a_field_is_its_own():
    layer = make(nn.Dropout(0.5, deterministic=False, name="own"))
    assert (run(layer, True, {}, dropout=0) == 0).any()
    with pytest.raises(ValueError, match=r'own \(Dropout\) draws from a missing RNG.* "dropout" only in training'):
        run(layer, False, {}, dropout=0)
    assert (run(make(nn.Dropout(0.5, deterministic=True, name="own")), True, {}, dropout=0) != 0).all()


def test_dropout_without_its_key_is_said_by_name():
    layer = make(Train(name="own"))
    with pytest.raises(ValueError, match=r"own \(Train\) draws from a missing RNG; there are \[\]"):
        run(layer, True)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return x * mask


class Nothing(nn.Module):
    pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Two(name="two"), r"two \(Two\): __call__\(x, mask\) is called with 1 positional .* 'mask'"),
        (Nothing(name="empty"), r"empty \(Nothing\) has no __call__"),
    ],
)
def test_modules_that_cannot_be_called_with_rows_alone_are_refused_by_name(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make(module).init, jax.random.key(0), M, VALID)


class Noise(nn.Module):
    stream: str = "noise"

    @nn.compact
    def __call__(self, x):
        return jax.random.normal(self.make_rng(self.stream), x.shape)


class NoiseWindowed(Noise, WindowedModule):
    """What it shows, less what it mixes in: zero if both were the same draw."""

    def halo(self, length):
        return 0, 0

    def context(self, x, rows):
        return self(x)

    def mix(self, x, halo, rows, halo_rows):
        return halo - self(x)


@pytest.mark.parametrize("train", grid((True, False), True))
@pytest.mark.parametrize(
    "module",
    grid(
        {"noise": Noise(name="own"), "other": Noise("other", name="own"), "windowed": NoiseWindowed(name="own")},
        "windowed",
    ),
)
def test_every_stream_arrives_with_keys_of_their_own_for_blocks(module, train):
    layer, stream = make(module), module.stream
    first, again, other = (run(layer, train, {}, **{stream: seed, "unused": 0}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert len(set(first.ravel().tolist())) == first.size


@pytest.mark.breadth  # test_every_stream_arrives_with_keys_of_their_own_for_blocks
def test_streams_arrive_where_short_pieces_are_computed_in_their_places():
    layer, m, valid = make(Noise(name="own")), jnp.ones((2, 3, D)), jnp.ones((2, 3), bool)
    y, *_ = layer.apply({}, m, valid, False, (None,), method="advance", rngs={"noise": jax.random.key(0, impl="rbg")})
    assert len(set(np.asarray(y).ravel().tolist())) == y.size


def test_a_stream_that_was_not_given_is_named():
    layer = make(Noise(name="own"))
    with pytest.raises(ValueError, match=r"own \(Noise\) draws .* there are \['other'\].*PRNG for \"noise\""):
        run(layer, False, {}, other=0)


def test_credit_does_not_train_the_module_it_asks():
    """What elements would have been worth is computed as in evaluation."""
    layer = SparseModularActivation((Train(name="own"),), RouterConfig(straight_through=True), block_size=4)
    variables = initial(layer)
    assert np.isfinite(run(layer, True, variables, dropout=0)).all()


class Other(nnx.Module):
    def __call__(self, x):
        return x


def function(x):
    return x


STRANGERS = {
    "nnx": (Other(), "Other is an NNX module: write it as a flax.linen.Module"),
    "nnx class": (Other, "Other is an NNX module"),
    "class": (Returning, r"Returning is a class: pass an instance, Returning\(...\)"),
    "function": (function, "function is a function: pass a flax.linen.Module that calls it"),
    "None": (None, "not None"),
    "number": (3, "not a int"),
}


@pytest.mark.parametrize(("stranger", "message"), STRANGERS.values(), ids=STRANGERS)
def test_what_is_not_a_linen_module_is_refused_where_it_is_given(stranger, message):
    target = MLP(MLPConfig(2, (3,)))
    network = hyper.mip(hyper.spec(target, jnp.ones((1, 1, 2)), jnp.ones(1, int)))
    takers = {
        r"modules\[1\]": lambda: make(Train(), stranger),
        "modules.0.": lambda: SeqBoatLayer(LayerConfig(4, 2, 4), (stranger,)),
        "spec": lambda: hyper.spec(stranger, M),
        "target": lambda: hyper.Hyper(stranger, network),
    }
    for where, take in takers.items():
        with pytest.raises(ValueError, match=f"{where}: expected a Flax linen module; {message}"):
            take()


def test_one_module_alone_is_not_a_list_of_modules():
    with pytest.raises(ValueError, match="expected a tuple of Flax linen modules, not a single Train"):
        SparseModularActivation(Train())


def test_a_hypernetwork_is_expected_around_a_target():
    target = MLP(MLPConfig(2, (3,)))
    with pytest.raises(ValueError, match=r"network: expected a HyperNetwork, as returned by hyper\.mip"):
        hyper.Hyper(target, target)
