"""The objective `slow`: distances of real layers' kernels, a run with it, and what it refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base
from experiments.common.errors import UserError
from experiments.objectives.slow import Config
from experiments.training import objectives
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE
from seqboat.layers.mixers import hyperzzw
from tests.helpers import grid, random_like

MIXER = {"name": "hyperzzw", "kernel_size": 32, "slow_width": 4, "slow_layers": 1, "frequency": 1.0}
QUICK = {"model.activation": "never", "model.remat": "none", "train.steps": 2, "train.evaluate_every": 2}


@pytest.fixture
def values(tiny):
    """values(weight=2.0) is those of an experiment whose layers have slow networks."""

    def make(changes=None, **fields):
        plain = tiny({**QUICK, **(changes or {})})
        mixed = {**plain, "model": {**plain["model"], "mixer": MIXER}}
        return {**mixed, "objectives": base.objective("slow", **fields).to_dict()}

    return make


def attach(values):
    return objectives.attach(build(values), Path("nowhere"))


@pytest.mark.parametrize("causal", grid((True, False), False))
def test_it_is_the_mean_distance_over_pairs_of_layers(values, causal):
    experiment = attach(values({"model.layers": 3, "model.causal": causal}, weight=2.0))
    objective = experiment.functions.objectives["slow"]
    shapes = jax.eval_shape(lambda: experiment.functions.variables(0))["params"]
    params = jax.device_get(random_like(shapes))
    ssm, mixer = params["encoder"]["layers"]["ssm"], experiment.network.config.encoder.layer.mixer
    lags = min(MIXER["kernel_size"], experiment.functions.example["inputs"].shape[1])
    own = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], ssm) for layer in range(3)]
    each = [[one] if causal else [jax.tree.map(lambda leaf, i=i: leaf[i], one) for i in range(2)] for one in own]

    @jax.jit
    def run(params, each):
        kernel = lambda one: hyperzzw.slow_kernel(hyperzzw.Params(**one), mixer, lags)
        found = objective({}, params, None, {}, {}, jax.random.key(0), 0)["kernel_distance"]
        return found, [[kernel(one) for one in layer] for layer in each]

    found, kernels = jax.device_get(run(params, each))
    distances = [np.square(np.array(kernels[i]) - np.array(kernels[j])).mean() for i in range(3) for j in range(i)]
    assert (found[0], found[2]) == (2.0, 1)
    np.testing.assert_allclose(found[1], np.mean(distances), rtol=1e-5)
    assert found[1] > 0


# test_objectives.py: a run with an objective; the value is that of the test above.
@pytest.mark.breadth
def test_a_run_reports_it(values, tmp_path):
    train(build(values(weight=0.5)), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert [record for record in records if record.get("slow/kernel_distance", 0) > 0]


def test_what_it_refuses(values, tiny):
    with pytest.raises(UserError, match=r"config.model.layers=1: config.objectives.slow compares two layers or more"):
        attach(values({"model.layers": 1}))
    other = {**tiny(QUICK), "objectives": base.objective("slow").to_dict()}
    with pytest.raises(UserError, match=r"config.objectives.slow: the layers' kernels are those of config.model.mixer"):
        attach(other)
    with pytest.raises(ValueError, match=r"weight=-1.0: must not be negative"):
        Config(-1.0)
