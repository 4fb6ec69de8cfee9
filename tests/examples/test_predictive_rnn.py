"""PV-RNN: its equations step by step, its KL divergences, what z of size 0 leaves, and its automaton."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import predictive_rnn as pv
from tests.helpers import assert_close, grid, normal, random_like

KEY, LENGTH = jax.random.key(0), 5
ROLLOUT = jax.jit(pv.rollout, static_argnums=3)


def params_of(z):
    params = pv.initialize(KEY, hidden=6, z=z)
    return params | {"b": normal(1, 6), "prior_bias": normal(2, 2 * z) / 4, "out_bias": normal(3, 2)}


def by_hand(params, a, noise):
    """The equations with loops, in float64; and the means and standard deviations of both distributions."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    size, tau = len(p["V"]), np.array([pv.FAST] * 3 + [pv.SLOW] * 3)
    h, xs, kls = np.zeros(6), [], []
    for t in range(LENGTH):
        d = np.tanh(h)
        prior = d @ p["prior"] + p["prior_bias"] if t else np.zeros(2 * size)
        mean, std = np.tanh(prior[:size]), np.exp(prior[size:])
        kls.append(0.0)
        if t < len(a):
            q_mean, q_std = np.tanh(a[t, :size]), np.exp(a[t, size:])
            ratio = (q_std**2 + (q_mean - mean) ** 2) / std**2
            kls[-1] = np.sum(np.log(std / q_std) + ratio / 2 - 0.5) / max(size, 1)
            mean, std = q_mean, q_std
        z = mean + std * noise[t]
        h = (1 - 1 / tau) * h + (p["W"].T @ d + p["V"].T @ z + p["b"]) / tau
        xs.append(np.tanh(h) @ p["out"] + p["out_bias"])
    return np.stack(xs), np.array(kls)


@pytest.mark.parametrize(("z", "known"), grid([(2, 3), (0, 3)], (2, 3)))
def test_a_rollout_is_its_equations(z, known):
    """Codes for the first steps, then the prior. With z of size 0 it is a network of two time scales without noise."""
    params, a = params_of(z), normal(4, known, 2 * z)
    x, kl = ROLLOUT(params, a, KEY, LENGTH)
    noise = np.asarray(jax.random.normal(KEY, (LENGTH, z)), np.float64)
    expected_x, expected_kl = by_hand(params, np.asarray(a, np.float64), noise)
    assert_close(x, expected_x)
    assert_close(kl, expected_kl, floor=1.0)
    if not z:
        assert_close(x, ROLLOUT(params, a, jax.random.key(1), LENGTH)[0])
        assert not np.any(kl)


def test_the_kl_divergence_is_its_expectation():
    q, p = (normal(5, 3), normal(6, 3) / 4), (normal(7, 3), normal(8, 3) / 4)
    draws = np.random.default_rng(0).standard_normal((200_000, 3))
    density = lambda z, of: -np.log(np.exp(of[1])) - np.square((z - of[0]) / np.exp(of[1])) / 2
    z = np.asarray(q[0]) + np.exp(np.asarray(q[1])) * draws
    ratio = (density(z, jax.tree.map(np.asarray, q)) - density(z, jax.tree.map(np.asarray, p))).sum(1)
    error = ratio.std() / len(ratio) ** 0.5
    assert abs(float(pv.kl(q, p)) - ratio.mean()) < 4 * error
    assert error < 0.02
    assert float(pv.kl(q, q)) == pytest.approx(0, abs=1e-6)


@pytest.mark.breadth  # test_a_rollout_is_its_equations
def test_the_automaton_has_the_3_grams_that_are_computed():
    drawn = pv.symbols(np.random.default_rng(0), 400, 60)
    assert (np.diff(drawn) != 0).all()
    grams = drawn[:, :-2] * 9 + drawn[:, 1:-1] * 3 + drawn[:, 2:]
    shares = np.bincount(grams.reshape(-1), minlength=27) / grams.size
    np.testing.assert_allclose(shares, pv.trigrams(), atol=0.01)
    assert pv.trigrams().sum() == pytest.approx(1)
    own = float(pv.ngram_divergence(jnp.asarray(pv.POINTS[drawn])))
    assert 0 <= own < 0.005
    assert float(pv.ngram_divergence(jnp.asarray(pv.POINTS[drawn[:, ::-1]]))) > 1


@pytest.mark.breadth  # its parts have tests of their own here
def test_three_steps(monkeypatch):
    sizes = {"SEQUENCES": 2, "LENGTH": 4, "GENERATED": (2, 14), "META_PRIORS": (1e-4, 1.0)}
    for name, value in sizes.items():
        monkeypatch.setattr(pv, name, value)
    sized = jax.eval_shape(lambda key: pv.initialize(key, hidden=4), KEY)
    monkeypatch.setattr(pv, "initialize", lambda key: random_like(sized))
    found = pv.run(range(2), 3)
    assert set(found) == {"w_0.0001", "w_0.0001_prior_alone", "w_1", "w_1_prior_alone"}
    assert set(found["w_1"]) == {"sigma", "ngrams", "window", "next"}
    assert set(found["w_1_prior_alone"]) == {"window", "next"}
    values = np.stack([value for row in found.values() for value in row.values()])
    assert values.shape == (12, 2)
    assert np.isfinite(values).all()
    assert (values > 0).all()
