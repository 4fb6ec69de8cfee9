"""Counter-current learning: the public loss, what each layer learns from, what is left without local losses."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import counter_current as ccl
from tests.helpers import assert_close, normal

FIXTURE = Path(__file__).parents[1] / "parity/fixtures/wide/ccl.npz"
WIDTHS = (6, 5, 4, 3)
X, TARGET = normal(0, 8, 6), jnp.array([0, 1, 2, 0, 1, 2, 0, 1])


@functools.cache
def initial():
    return jax.jit(lambda: ccl.initialize(jax.random.key(0), WIDTHS))()


@pytest.fixture(scope="module")
def gradients():
    objectives = {arm: jax.grad(lambda params, arm=arm: ccl.objective(arm, params, (X, TARGET))) for arm in ccl.ARMS}
    # Of each layer's loss alone, by layer.
    own = jax.jacrev(lambda params: jnp.stack(ccl.losses(ccl.forward(params, X), ccl.backward(params), TARGET)))
    return jax.jit(lambda params: ({arm: grad(params) for arm, grad in objectives.items()}, own(params)))(initial())


def test_the_local_loss_is_that_of_the_public_code():
    with np.load(FIXTURE) as file:
        a, b, target, loss = (jnp.asarray(file[name]) for name in ("a", "b", "target", "loss"))
        expected = file["g/a"], file["g/b"]
    value, found = jax.jit(jax.value_and_grad(ccl.local_loss, (0, 1)))(a, b, target)
    assert_close(value, loss)
    assert_close(found, expected)


def test_no_gradient_passes_from_one_layer_to_the_next(gradients):
    """Loss l moves the weights that make a_l and b_l, and no others."""
    _, by_layer = gradients
    top = len(WIDTHS) - 1
    for index, weight in enumerate(by_layer["forward"], start=1):  # W_l makes a_l
        assert [bool(np.any(weight[layer])) for layer in range(top + 1)] == [layer == index for layer in range(top + 1)]
    for index, weight in enumerate(by_layer["backward"]):  # V_{l+1} makes b_l
        assert [bool(np.any(weight[layer])) for layer in range(top + 1)] == [layer == index for layer in range(top + 1)]


def test_without_local_losses_the_top_learns_on_frozen_features(gradients):
    arms, _ = gradients
    assert [bool(np.any(weight)) for weight in arms["frozen"]["forward"]] == [False, False, True]
    assert not any(np.any(weight) for weight in arms["frozen"]["backward"])
    assert all(np.any(weight) for weight in arms["backprop"]["forward"])
    assert_close(arms["counter_current"]["forward"][-1], arms["backprop"]["forward"][-1])


@pytest.mark.breadth  # its parts have tests of their own here
def test_three_steps():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    found = ccl.run(range(2), 3)
    assert set(found) == set(ccl.ARMS)
    values = np.stack([row["accuracy"] for row in found.values()])
    assert values.shape == (3, 2)
    assert ((values >= 0) & (values < 0.9)).all()


def test_an_epoch_has_every_example_once():
    rows = ccl.order(0, 3 * ccl.BATCH, 5)
    assert rows.shape == (5, ccl.BATCH)
    assert sorted(rows[:3].reshape(-1)) == list(range(3 * ccl.BATCH))
    assert not np.array_equal(rows, ccl.order(1, 3 * ccl.BATCH, 5))
