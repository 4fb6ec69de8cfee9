"""How far back gradients reach through each mixer at its start, before any training.

    python -m experiments.study --study=reach

Every mixer alone, at width 64 with its defaults, on white noise of 64 elements; the slope of ln r over lags 1 to 30, by
`seqboat.analysis.reach`. Of the LSTM also forget gates that start closed and open.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common.spread import spread
from seqboat.analysis.reach import reach, slope
from seqboat.layers.mixer import MixerConfig
from seqboat.layers.mixers import elman, ema, gru, lru, lstm, s4d, s5, ssd
from seqboat.parallel.rules import SINGLE_DEVICE

FOLDER, ROWS = "probes", True
WIDTH, LENGTH, EXAMPLES, DRAWS = 64, 64, 8, 16
ARMS: dict[str, MixerConfig] = {
    "elman": elman.Config(),
    "gru": gru.Config(),
    "lstm": lstm.Config(),
    "lstm_forget_bias_0": lstm.Config(forget_bias=0.0),
    "lstm_forget_bias_4": lstm.Config(forget_bias=4.0),
    "ema": ema.Config(),
    "s4d": s4d.Config(),
    "lru": lru.Config(),
    "s5": s5.Config(),
    "ssd": ssd.Config(),
}


def study(save: Callable[[dict[str, Any]], None], *, seeds: range = range(5)) -> None:
    """Measures all arms, each from the same seeds, and saves a table after each."""
    found: dict[str, Any] = {}
    for name, config in ARMS.items():
        slopes = measure(config, seeds)
        over_seeds = {"values": slopes, **spread(slopes)}
        fields = {"mixer": {"name": config.name, **dataclasses.asdict(config)}}
        table = {"config": fields, "seeds": list(seeds), "metrics": {"slope": over_seeds}}
        found[name] = {**table, "test": [{"selection_metric": "slope"}]}
        save(found)
        print(f"{name}: {over_seeds['mean']:+.3f} per element, {min(slopes):+.3f} to {max(slopes):+.3f}", flush=True)


def measure(config: MixerConfig, seeds: range) -> list[float]:
    """The slope from every seed."""
    module: Any = config.make(True, SINGLE_DEVICE)
    valid = jnp.ones((EXAMPLES, LENGTH), bool)

    @jax.jit
    def run(key):
        inputs, parameters, directions = jax.random.split(key, 3)
        x = jax.random.normal(inputs, (EXAMPLES, LENGTH, WIDTH))
        variables = module.init(parameters, x[:1, :1], valid[:1, :1])
        return reach(
            lambda x: module.apply(variables, x, valid), x, valid.sum(1), jax.random.normal(directions, (DRAWS, WIDTH))
        )

    return [slope(run(jax.random.key(seed))) for seed in seeds]
