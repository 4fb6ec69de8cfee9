"""LRU, S5 and SSD: how they start, their null forms, and what they refuse. Their equations are tested beside `ops`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal

from seqboat.layers.config import LayerConfig
from seqboat.layers.mixers import lru, s5, ssd
from seqboat.ops.s5 import S5Params, discretize, legs
from seqboat.parallel.rules import SINGLE_DEVICE

WIDTH = 6


def start(config, causal=True):
    mixer, x = config.make(causal, SINGLE_DEVICE), jnp.zeros((1, 3, WIDTH))
    return jax.jit(mixer.init)(jax.random.key(0), x, jnp.ones((1, 3), bool))["params"]


@pytest.mark.breadth  # test_linear_mixers.py: what it computes
def test_lru_starts_in_its_ring():
    params = start(lru.Config(state_size=2000, r_min=0.5, r_max=0.9, max_phase=1.0), causal=False)
    radius, phase = np.exp(-np.exp(params["nu_log"])), np.exp(params["theta_log"])
    assert radius.shape == (2, 2000)
    assert (np.abs(radius - 0.7) <= 0.2001).all()
    assert (phase <= 1.0001).all()
    # Uniform in area: r^2 is uniform. Both directions are drawn apart.
    np.testing.assert_allclose(np.square(radius).mean(1), (0.25 + 0.81) / 2, atol=0.02)
    np.testing.assert_allclose(phase.mean(1), 0.5, atol=0.03)
    assert (radius[0] != radius[1]).all()
    np.testing.assert_allclose(np.exp(2 * params["gamma_log"]) + np.square(radius), 1, atol=1e-5)


@pytest.mark.breadth  # tests/parity/test_linear_mixers.py
def test_lru_without_memory_is_a_map_of_single_elements():
    config = lru.Config(state_size=4, r_min=0.0, r_max=1e-9)
    params, x = start(config), normal(0, 2, 5, WIDTH)
    y = config.make(True, SINGLE_DEVICE).apply({"params": params}, x, jnp.ones((2, 5), bool))
    b, c, d = (np.asarray(params[name], np.float64) for name in ("b", "c", "d"))
    x = np.asarray(x, np.float64)
    expected = (x @ (b[:, 0] + 1j * b[:, 1]) @ (c[0] + 1j * c[1])).real + d * x
    assert_close(y, expected)


def test_s5_starts_as_legs():
    """The eigenvectors diagonalise the normal part of the matrix; B and C are those of real matrices of size 2P."""
    size = 8
    a, vectors = legs(size)
    n = np.arange(2 * size)
    matrix = -np.sqrt(np.outer(2 * n + 1, 2 * n + 1)) * (n[:, None] > n) - np.diag(n + 1.0)
    matrix += np.sqrt(np.outer(n + 0.5, n + 0.5))
    np.testing.assert_allclose(matrix @ vectors, vectors * a, atol=1e-9)
    both, basis = np.r_[a, a.conj()], np.c_[vectors, vectors.conj()]
    np.testing.assert_allclose(basis @ np.diag(both) @ basis.conj().T, matrix, atol=1e-9)
    params = start(s5.Config(state_size=size))
    np.testing.assert_allclose(-np.exp(params["a_real_log"]) + 1j * params["a_imag"], a, rtol=1e-5)
    b = np.asarray(params["b"][:, 0] + 1j * params["b"][:, 1]).T
    np.testing.assert_allclose(vectors.conj().T @ (2 * (vectors @ b).real), b, atol=1e-5)
    assert 0.1 / size < np.square(np.abs(params["c"])).mean() < 2 / size
    assert (np.abs(params["dt_log"] - np.log(1e-2)) <= np.log(10.001)).all()


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_s5_discretisations_agree_for_short_steps(method):
    """Both are dt B and 1 + dt A to first order, and |A'| < 1 for any step."""
    a_imag, nothing = np.asarray([0.5, -2.0, 5.0]), jnp.zeros(())
    params = S5Params(jnp.zeros(3), jnp.asarray(a_imag, jnp.float32), jnp.full(3, np.log(1e-3)), *[nothing] * 3)
    decay, weight = discretize(params, method)
    np.testing.assert_allclose(decay, 1 + 1e-3 * (-1 + 1j * a_imag), atol=2e-5)
    np.testing.assert_allclose(weight, 1e-3, rtol=5e-3)
    assert (np.abs(discretize(params._replace(dt_log=jnp.full(3, 3.0)), method)[0]) < 1).all()


def test_ssd_starts_with_the_published_steps():
    config = ssd.Config(expand=4, head_size=1, state_size=2)
    params = start(config)
    dt = np.log1p(np.exp(np.asarray(params["dt_bias"])))
    assert dt.shape == (4 * WIDTH,)
    assert (np.abs(np.log(dt) - np.log(1e-2)) < np.log(10.1)).all()
    assert dt.std() > 0.01
    rates = np.exp(params["a_log"])
    assert (np.abs(rates - 8.5) <= 7.51).all()
    assert rates.std() > 2


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: lru.Config(r_max=1.0), "r_max=1.0: must be above 0 and below 1"),
        (lambda: lru.Config(r_min=0.95, r_max=0.9), "r_min=0.95: must be 0 to r_max=0.9"),
        (lambda: lru.Config(max_phase=7.0), "max_phase=7.0: must be above 0 and at most 2 pi"),
        (lambda: lru.Config(state_size=0), "state_size=0: must be "),
        (lambda: s5.Config(shortest_step=0.0), "shortest_step=0.0: must be above 0 and at most longest_step=0.1"),
        (lambda: ssd.Config(convolution=0), "convolution=0: must be 1 to 1024"),
        (
            lambda: LayerConfig(WIDTH, 4, 8, mixer=ssd.Config(head_size=5)),
            "mixer.head_size=5: must divide expand * features = 12",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_field(refused, words):
    with pytest.raises(ValueError, match=f"^{words}".replace("*", r"\*")):
        refused()
