"""What splicing costs: three losses, of a dictionary that is exact, and of the mean."""

import jax
import numpy as np
import pytest
from helpers import random_like

from experiments.common.errors import UserError
from experiments.evaluation import splicing
from experiments.training.experiment import build
from experiments.training.restore import Run
from experiments.training.step import means
from seqboat.layers import taps
from tests.interp.test_edits import same


@pytest.fixture(scope="module")
def run(tiny):
    values = tiny({"task.test_examples": 8})
    experiment = build(values)
    return Run(values, experiment.model, random_like(jax.eval_shape(lambda: experiment.functions.variables(0))), 0)


@pytest.mark.parametrize(
    ("site", "layer", "message"),
    [
        ("gating", 1, "gating of layer 1: edits: there is no site 'gating' in this model; it has"),
        ("gated", 3, "gated of layer 3: layer=3: layers are numbered from 1 to 2"),
        ("m", 1, "m of layer 1: Splice: a dictionary from 16 to 16 channels at a value of 8"),
    ],
)
def test_a_dictionary_of_another_site_is_refused(run, site, layer, message):
    with pytest.raises(UserError, match=message) as found:
        splicing.losses(run, "test", site, layer, same(16))
    assert "\n" not in str(found.value)


@pytest.mark.breadth  # test_edits.py: what splices and replacements do; here four programs are compiled
def test_three_losses_of_a_split(run):
    found = splicing.losses(run, "test", "gated", 2, same(16))
    assert found["spliced"] == pytest.approx(found["plain"], rel=1e-5)
    assert abs(found["ablated"] - found["plain"]) > 1e-4 * found["plain"]

    (batch,) = run.task.evaluation_batches("test")
    examine = jax.jit(lambda v, b: run.experiment.functions.evaluate_examples(v, b, tapped=True))
    examined = examine(run.variables, batch)
    assert found["plain"] == pytest.approx(means(examined.total)["loss"], rel=1e-5)
    value = np.asarray(taps.read(examined.taps, "gated"))[1]
    active = np.asarray(taps.read(examined.taps, "active"))[1, ..., 0]
    assert 0 < active.sum() < batch["lengths"].sum()
    np.testing.assert_allclose(splicing.mean(run, "test", "gated", 2), value[active].mean(0), rtol=1e-4, atol=1e-6)
