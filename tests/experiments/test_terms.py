"""Terms of the loss that modules state: their gradient, their weight, and that without them nothing changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.experiment import build
from experiments.training.step import means
from seqboat.layers.sparse_activation import SparseModularActivation
from seqboat.layers.terms import Term, collect, term
from tests.helpers import assert_close

CAPACITY = {"model.layers": 1, "model.router.rule": "capacity", "model.router.capacity": 0.3}


@pytest.mark.breadth  # test_names_add_up_over_layers_calls_and_modules
def test_without_terms_the_objective_is_what_it_was(tiny):
    """Character by character, whether or not anybody asks for terms."""
    functions = build(tiny()).functions
    batch, variables = (
        jax.tree.map(jnp.asarray, dict(functions.example)),
        jax.eval_shape(lambda: functions.variables(0)),
    )
    run = lambda params, stats, names: functions.objective(params, stats, batch, jax.random.key(0), 0.1, names)[0]
    without, asked = (
        str(jax.make_jaxpr(run, static_argnums=2)(variables["params"], variables["batch_stats"], names))
        for names in (("batch_stats",), ("batch_stats", "terms"))
    )
    assert without == asked


@pytest.mark.breadth  # test_capacity.py: test_training_activates_the_share_and_states_the_cross_entropy
def test_the_gradient_of_the_capacity_term_is_that_of_finite_differences(tiny, random_state):
    """By the bias of the router, which moves all margins alike: the term's part of the gradient, in float64."""
    experiment = build(tiny({**CAPACITY, "model.router.capacity_loss": 0.5}))
    bare = build(tiny({**CAPACITY, "model.router.capacity_loss": 0.0}))
    state, batch = random_state(experiment), jax.tree.map(jnp.asarray, experiment.task.train_batch(0))

    def gradient(functions):
        aux = jax.grad(functions.objective, has_aux=True)(
            state.params, state.batch_stats, batch, jax.random.key(0), 0.0, ("batch_stats", "taps", "terms")
        )
        return aux[0]["encoder"]["layers"]["sparse"]["configurator"]["logits"]["bias"], aux[1][0], aux[1][2]["taps"]

    (with_term, metrics, taps), (without, _, _) = jax.jit(
        lambda: (gradient(experiment.functions), gradient(bare.functions))
    )()
    sparse = taps["encoder"]["layers"]["sparse"]
    logits = np.asarray(sparse["configurator"]["router_logits"], np.float64)[0, :, :, 0]
    active = np.asarray(sparse["active"])[0, :, :, 0]
    valid = np.arange(active.shape[1])[None] < np.asarray(batch["lengths"])[:, None]

    def mean(shift):
        margin = logits[..., 1] - logits[..., 0] + shift
        return (np.logaddexp(0, margin) - np.where(active, margin, 0))[valid].mean()

    weight = float(batch["weights"].sum())
    expected = 0.5 * weight * (mean(1e-5) - mean(-1e-5)) / 2e-5
    np.testing.assert_allclose((with_term - without)[0], [-expected, expected], rtol=1e-4)
    np.testing.assert_allclose(means({"term": metrics["term/capacity"]})["term"], mean(0), rtol=1e-5)


def test_names_add_up_over_layers_calls_and_modules():
    class Stating(nn.Module):
        @nn.compact
        def __call__(self, x):
            term(self, "size", 0.5, x.sum(), jnp.float32(x.size))
            return x

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            once, other = Stating(name="once"), Stating(name="other")
            return other(once(once(x)))

    _, sown = Twice().apply({}, jnp.full(4, 2.0), mutable=["terms"])
    assert_close(collect(sown["terms"])["size"], Term(12.0, 24.0, 12.0))
    assert Twice().init(jax.random.key(0), jnp.ones(4)) == {}


def test_a_module_that_is_activated_cannot_state_a_term():
    class Stating(nn.Module):
        @nn.compact
        def __call__(self, x):
            term(self, "size", 1.0, x.sum(), jnp.float32(1))
            return x

    layer = SparseModularActivation((Stating(name="own"),), activation="always")
    with pytest.raises(ValueError, match=r"own \(Stating\) states a term of the loss; a module that is activated can"):
        jax.eval_shape(lambda x, valid: layer.apply({}, x, valid), jnp.ones((1, 4, 2)), jnp.ones((1, 4), bool))
