"""The layer against its equations, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_battery import BOTH, CAUSAL, VALID, Case

from seqboat.layers.mixers import ema
from seqboat.layers.naive import seqboat_layer
from tests.helpers import grid

# Every position with either direction, every attention function with and without a window, every norm and placement.
CASES = {
    "relative, softmax": BOTH,
    "relative, causal relu2": dataclasses.replace(CAUSAL, attention_function="relu2", norm="rms"),
    "slot, laplace": dataclasses.replace(
        BOTH, position="slot", attention_function="laplace", mixer=ema.Config(4, truncation=5)
    ),
    "slot, causal softmax": dataclasses.replace(CAUSAL, position="slot", norm_placement="post"),
    "rotary, relu2, full": dataclasses.replace(
        BOTH, position="rotary", attention_function="relu2", window_size=None, norm="scale"
    ),
    "rotary, causal laplace": dataclasses.replace(CAUSAL, position="rotary", attention_function="laplace"),
    "t5, softmax, full": dataclasses.replace(BOTH, position="t5", window_size=None, norm_affine=False),
    "t5, causal relu2": dataclasses.replace(
        CAUSAL, position="t5", attention_function="relu2", mixer=ema.Config(4, truncation=7)
    ),
    "none, laplace, full": dataclasses.replace(BOTH, position="none", attention_function="laplace", window_size=None),
    "none, causal softmax, full": dataclasses.replace(CAUSAL, position="none", window_size=None),
    "always": dataclasses.replace(CAUSAL, activation="always"),
    "never": dataclasses.replace(BOTH, activation="never"),
}


# Both directions: the published layer in tests/parity. Other functions and positions:
# tests/ops/test_window_attention.py.
@pytest.mark.parametrize("config", grid(CASES, "relative, causal relu2"))
def test_the_layer_is_its_equations(config):
    case = Case(config)

    @jax.jit
    def equations(params, x, cotangent):
        run = lambda params, x: seqboat_layer(params, x, VALID, config)
        with jax.numpy_rank_promotion("allow"):  # equations broadcast as they are written
            y, transpose, active = jax.vjp(run, params, x, has_aux=True)
            return y, active, transpose(cotangent)

    cotangent = jnp.where(VALID[..., None], case.cotangent, 0)
    hide = lambda y: jnp.where(VALID[..., None], y, 0)
    for level in ("none", "one", "some", "all") if case.learned else ("as configured",):
        params = case.routed(level)
        y, stats, taps, gradients = case.packed(params)
        expected, active, wanted = equations(params, case.x, cotangent)
        case.close(hide(y), hide(expected))
        case.close(gradients, wanted)
        if case.learned:
            count = int(active.sum())
            assert {"none": count == 0, "one": count == 1, "all": count == VALID.sum()}.get(level, 1 < count < 18)
            assert (taps["sparse"]["active"][..., 0] == active).all()
            assert stats.active[0] == count
