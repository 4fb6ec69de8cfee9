"""DDMI in one dimension: interpolation, equal decoders, its KL divergence, fields that know nothing, the diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import implicit_signals as ddmi
from tests.helpers import assert_close, grid, normal, random_like

U = ddmi.coordinates(16)


def drawn(initialize, *given):
    """Parameters of the size that they have at the start, without compiling an initialiser."""
    return jax.tree.map(lambda leaf: leaf / 8, random_like(jax.eval_shape(lambda: initialize(*given))))


def test_a_field_is_read_linearly_between_the_middles_of_its_parts():
    field, u = normal(0, 8, 3), np.array([0.0, 0.01, 0.3, 0.5, 0.77, 1.0])
    middles = (np.arange(8) + 0.5) / 8
    expected = np.stack([np.interp(u, middles, channel) for channel in np.asarray(field).T], 1)
    assert_close(ddmi.interpolate(field, jnp.asarray(u, jnp.float32)), expected)


@pytest.mark.breadth  # test_a_field_is_read_linearly_between_the_middles_of_its_parts
def test_a_chirp_is_the_same_function_at_every_resolution():
    coarse, fine = (ddmi.chirps(jax.random.key(0), 3, samples) for samples in (16, 48))
    np.testing.assert_allclose(fine[:, 1::3], coarse, atol=1e-4)


def test_decoders_have_equal_sizes():
    shapes = jax.eval_shape(lambda key: {arm: ddmi.initialize(arm, key) for arm in ddmi.DECODERS}, jax.random.key(0))
    sizes = {arm: sum(leaf.size for leaf in jax.tree.leaves(tree["decoder"])) for arm, tree in shapes.items()}
    for size in sizes.values():
        assert size == pytest.approx(sizes["adaptive"], rel=0.05)


def test_the_kl_divergence_is_its_expectation():
    mean, log_std = 0.7, -0.4
    z = mean + np.exp(log_std) * np.random.default_rng(0).standard_normal(200_000)
    ratio = -log_std - np.square((z - mean) / np.exp(log_std)) / 2 + np.square(z) / 2
    error = ratio.std() / len(ratio) ** 0.5
    assert abs(float(ddmi.kl(jnp.asarray([mean]), jnp.asarray([log_std]))[0]) - ratio.mean()) < 4 * error
    assert float(ddmi.kl(jnp.zeros(1), jnp.zeros(1))[0]) == 0


@pytest.mark.breadth  # test_decoders_have_equal_sizes
def test_a_constant_field_knows_neither_the_signal_nor_the_place():
    """Equal rows of a latent decode to a constant: only the fields tell coordinates apart."""
    params = drawn(ddmi.initialize, "adaptive", jax.random.key(0))
    decode = jax.jit(lambda latents: ddmi.decode("adaptive", params, latents, 16))
    constant = jnp.broadcast_to(normal(1, 1, ddmi.GRID[1]), ddmi.GRID)
    flat, varied = decode(jnp.stack([constant, normal(2, *ddmi.GRID)]))
    np.testing.assert_allclose(flat, flat[0], rtol=1e-4)
    assert varied.std() > 100 * flat.std()


def test_noise_keeps_the_variance_and_ends_as_noise():
    shares = np.asarray(ddmi.kept())
    assert shares.shape == (ddmi.NOISES,)
    assert (np.diff(shares) < 0).all()
    assert shares[0] > 0.999
    assert shares[-1] < 1e-3
    level = jnp.arange(4) * 30
    x = ddmi.noisy(normal(3, 4, 4000), normal(4, 4, 4000), level)
    np.testing.assert_allclose(x.var(1), 1, atol=0.1)


def test_with_the_true_noise_sampling_ends_at_the_latent(monkeypatch):
    """Of data that are one point x, the noise in a noisy latent is known."""
    monkeypatch.setattr(ddmi, "NOISES", 20)
    x = normal(5, 1, ddmi.LATENT)
    share = lambda level: ddmi.kept()[level][:, None]
    true = lambda _, noisy, level: (noisy - jnp.sqrt(share(level)) * x) / jnp.sqrt(1 - share(level))
    monkeypatch.setattr(ddmi, "predict", true)
    found = jax.jit(lambda key: ddmi.sample(None, key, 3))(jax.random.key(0))
    np.testing.assert_allclose(found, jnp.broadcast_to(x, found.shape), atol=1e-3)


@pytest.mark.breadth  # its parts have tests of their own here
@pytest.mark.parametrize("arms", grid({"all": list(ddmi.DECODERS), "mip": ["hypernetwork_mip"]}, "mip"))
def test_three_steps(monkeypatch, arms):
    for name, value in {"FINE": 32, "SAMPLES": 16, "BATCH": 2, "TEST": 3, "BANK": 5, "NOISES": 4}.items():
        monkeypatch.setattr(ddmi, name, value)
    monkeypatch.setattr(ddmi, "DECODERS", {arm: ddmi.DECODERS[arm] for arm in arms})
    for name in ("initialize", "initialize_denoiser"):  # numbers that take no compilation
        own = getattr(ddmi, name)
        monkeypatch.setattr(ddmi, name, lambda *given, own=own: drawn(own, *given))
    found = ddmi.run(range(1), 3)
    with_diffusion = {"constant", "diffusion", "normal_latents", "new_chirps"} if "adaptive" in arms else set()
    assert set(found) == {*arms, *with_diffusion}
    assert all(np.isfinite(value).all() for row in found.values() for value in row.values())
    assert {name for name, row in found.items() if "distance" in row} == with_diffusion - {"constant"}
