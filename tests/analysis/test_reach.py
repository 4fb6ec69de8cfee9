"""How far gradients reach: against the closed form of decaying averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal

from seqboat.analysis.reach import horizon, reach, slope

LENGTHS = np.array([9, 5, 0])
DECAY, GAIN = np.array([0.9, 0.5, 0.7], np.float32), np.array([1.0, 3.0, 1e3], np.float32)


def averages(x):
    """y_t = gain * sum over tau of decay^tau x_{t - tau}, of every sequence its own."""
    lag = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])[None]
    power = jnp.where(lag >= 0, DECAY[:, None, None] ** np.maximum(lag, 0)[None], 0)
    return jnp.einsum("bts,bsd->btd", GAIN[:, None, None] * power, x)


def test_reach_is_the_mean_of_the_sequences_that_are_long_enough():
    found = jax.jit(lambda x, u: reach(averages, x, jnp.asarray(LENGTHS), u))(normal(0, 3, 12, 4), normal(1, 2, 4))
    lag = np.arange(9)
    known = GAIN[:, None] * (lag[None] < LENGTHS[:, None])
    assert_close(found[:9], (known * DECAY[:, None] ** lag[None]).sum(0) / known.sum(0))
    assert np.isnan(found[9:]).all()


@pytest.mark.parametrize("width", [1, 3])
def test_another_width_of_the_output_and_one_element(width):
    """What only the present reaches has r = 0 at every other lag; y may be narrower than x."""
    found = reach(lambda x: 2 * x[..., :width], normal(0, 1, 4, 3), jnp.array([4]), normal(1, 2, width))
    assert found.tolist() == [1, 0, 0, 0]
    assert np.isnan(slope(found))
    assert horizon(found) == 0


def test_slope_and_horizon_of_an_exponential():
    r = np.exp(-0.25 * np.arange(64))
    assert slope(r) == pytest.approx(-0.25)
    assert slope(r, (1, 1000)) == pytest.approx(-0.25)
    assert horizon(r) == 18  # ln 100 / 0.25 = 18.4
    r[40:] = 0
    assert slope(r, (30, 50)) == pytest.approx(-0.25)
