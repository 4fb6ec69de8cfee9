"""Runs with codebooks: their start from a trained run, what is bound of them, refusals; and the study of TokFSM."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments.common.errors import UserError
from experiments.evaluation.sampling import Sampling, forced, generate
from experiments.studies import codebooks as study
from experiments.studies.protocol import verdict
from experiments.tasks.features import BYTE_VOCABULARY
from experiments.training import codebooks
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.restore import bound, load
from seqboat.interp.codebooks import Codebook
from seqboat.interp.edits import Replace, each
from seqboat.layers import taps
from seqboat.layers.mixers import ema
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.bottlenecked import Bottlenecked, CodebookConfig, bind
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from tests.helpers import assert_close, random_like

# Without attention a step compiles in a second.
QUICK = {"model.activation": "never", "model.remat": "none", "train.evaluate_every": 6}


@pytest.fixture
def quantized(tiny):
    """quantized(codes=16) is the values of an experiment with such codebooks."""

    def values(changes=None, **fields):
        group = base.codebook()
        group.update(codes=16, **fields)
        return {**tiny({**QUICK, **(changes or {})}), "codebook": group.to_dict()}

    return values


def test_a_run_starts_from_another(tiny, quantized, untrained, tmp_path):
    experiment, plain = build(quantized()), load(untrained(tiny(QUICK), tmp_path / "plain"))
    variables = codebooks.start(experiment, plain)
    assert_close(variables["params"]["target"], plain.variables["params"], 0)
    x, tables = np.asarray(variables["params"]["codebooks"]["m"]), experiment.network.config.encoder
    assert x.shape == (tables.layers, 1, 16, tables.layer.features)
    assert len(np.unique(x.reshape(-1, x.shape[-1]), axis=0)) > 16


# test_a_run_starts_from_another; tests/models/test_bottlenecked.py: what is trained and bound; test_loop.py: a run
@pytest.mark.breadth
def test_a_run_trains_and_is_bound(tiny, quantized, untrained, tmp_path):
    source = untrained(tiny(QUICK), tmp_path / "plain")
    experiment, plain = build(quantized()), load(source)
    x = np.asarray(codebooks.start(experiment, plain)["params"]["codebooks"]["m"])
    train(experiment, tmp_path / "codes", source)
    run = load(tmp_path / "codes")
    assert isinstance(run.model, Bottlenecked)
    assert np.abs(np.asarray(run.variables["params"]["codebooks"]["m"]) - x).max() > 0
    records = [json.loads(line) for line in (tmp_path / "codes/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record.get("kind") == "train"]
    assert all(0 < record["term/m_codes_in_use"] <= 1 and record["term/m_distance"] > 0 for record in steps)

    free, batch = bound(run), next(iter(run.task.evaluation_batches("test")))
    assert free.values["codebook"] is None
    apply = lambda run: jax.jit(run.model.apply)(run.variables, batch["inputs"], batch["lengths"]).logits
    assert_close(apply(free), apply(run))
    assert rms_apart(apply(free), apply(plain)) > 0


def rms_apart(a, b) -> float:
    return float(jnp.sqrt(jnp.square(a - b).mean()))


# test_a_run_starts_from_another; test_loop.py: test_init_from_another_model_makes_no_work_directory
@pytest.mark.breadth
def test_sources_that_do_not_fit(tiny, quantized, untrained, tmp_path):
    other = untrained(tiny({**QUICK, "model.features": 4}), tmp_path / "other")
    experiment = build(quantized())
    with pytest.raises(UserError, match=r"^--init_from=.*other is a run of another model than config\.model: params/"):
        codebooks.start(experiment, load(other))
    with pytest.raises(UserError, match=r"config\.codebook\.codes=16: layer 1 has 15 values to start from$"):
        codebooks._tables([np.zeros((15, 8), np.float32)], (1, 1, 16, 8), experiment.config)


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"sites": ("x",)}, r"config\.codebook\.sites=\('x',\): no 'x' in this model; there are m, "),
        ({}, {"groups": 3}, r"config\.codebook\.groups=3: must divide 8, the width of m"),
        ({}, {"k": 17}, r"config\.codebook\.k=17: must be in 1\.\.16, the codes"),
        ({}, {"codes": 0}, r"config\.codebook\.codes=0: must be at least 1"),
        ({"mesh": "data"}, {}, r"config\.mesh='data': not together with config\.codebook"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(quantized, changes, fields, message):
    values = quantized()
    with pytest.raises(UserError, match=message):
        build({**values, **changes, "codebook": {**values["codebook"], **fields}})


def test_a_classifier_with_codebooks_has_no_streams(quantized):
    with pytest.raises(ValueError, match="a Classifier has no streams"):
        build(quantized()).model.initial_state(1)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (["m:1"], "--force=m:1: expected SITE:LAYER:CODE, as m:1:17"),
        (["m:1:-2"], "expected SITE:LAYER:CODE"),
        (["m:1:16"], r"--force: codes 16\.\.16: a codebook has the codes 0\.\.15"),
        (["q:1:1"], "--force: there are no codebooks at 'q', but at m"),
    ],
)
def test_codes_that_a_sample_cannot_take(codes, message):
    book = Codebook(np.ones(2, bool), jnp.zeros((2, 1, 16, 8)))
    with pytest.raises(UserError, match=message):
        forced(None, {"edits": {"encoder": {"layers": {"m": book}}}}, codes)


@pytest.mark.breadth  # test_bottlenecked.py: forced codes; test_generate.py: the program
def test_generation_with_forced_codes_is_that_with_the_values_of_these_codes():
    layer = LayerConfig(8, 4, 6, mixer=ema.Config(2), window_size=3, causal=True, block_size=4)
    model = LanguageModel(LanguageModelConfig(EncoderConfig(layer, 1), BYTE_VOCABULARY))
    quantized = Bottlenecked(model, CodebookConfig(codes=3))
    one = (jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    found = random_like(jax.eval_shape(quantized.init, jax.random.key(0), *one))
    table = found["params"]["codebooks"]["m"] = 5 * found["params"]["codebooks"]["m"]
    plain, bound_variables = bind(quantized, found)
    replaced = taps.write(plain, {"m": each([Replace(True, table[0, 0, 2])])})
    drawn = {
        name: np.stack(list(generate(plain, variables, b"ab", Sampling(0), batch=1, count=4))).tolist()
        for name, variables in {
            "forced": forced(plain, bound_variables, ["m:1:2"]),
            "other": forced(plain, bound_variables, ["m:1:0"]),
            "replaced": {**bound_variables, "edits": replaced},
        }.items()
    }
    assert drawn["forced"] == drawn["replaced"] != drawn["other"]


# The study


def planted(rng, count=4000, states=5):
    """Codes that name states, two for each, in the second layer but for a tenth of the elements."""
    own = rng.integers(states, size=count)
    codes = np.stack([2 * own + rng.integers(2, size=count)] * 2)
    codes[1] = np.where(rng.random(count) < 0.1, rng.integers(2 * states, size=count), codes[1])
    m = np.stack(
        [np.eye(states)[own] + 0.01 * rng.standard_normal((count, states)), rng.standard_normal((count, states))]
    )
    return study.Seen(own, np.arange(count) % 2 == 0, m, codes, 2 * states)


def test_codes_that_name_states_are_precise_and_channels_are_measured_at_their_recall():
    seen = planted(np.random.default_rng(0))
    first, second = (study.of_layer(seen, layer) for layer in (0, 1))
    assert first["precision"] == 1
    assert first["channel_precision"] > 0.99
    assert first["recall"] == pytest.approx(0.5, abs=0.05)
    assert first["information"] == pytest.approx(1)
    assert (first["codes_in_use"], first["codes_per_state"]) == (10, 2)
    np.testing.assert_array_equal(first["typical"] // 2, np.arange(5))
    assert second["precision"] == pytest.approx(0.92, abs=0.04)  # 0.9 + 0.1 / 5
    assert second["channel_precision"] < 0.5
    assert 0.5 < second["information"] < 0.9


def test_divergences_and_the_true_distributions():
    p, q = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.5, 0.5], [0.0, 1.0]])
    np.testing.assert_allclose(study.divergence(p, q), [0, np.log(2)])
    follow = study.successors(np.array([[10, 11, 25], [90, 35, 36]]))
    np.testing.assert_allclose(follow[:, [1, 2, 3, 9]], [[2 / 3, 1 / 3, 0, 0], [0, 0, 2 / 3, 1 / 3]])
    other = study.differing(np.random.default_rng(0), np.array([0, 1]), follow)
    np.testing.assert_array_equal(other, [1, 0])


def test_bars_are_those_of_the_worst_seed():
    more = {"recall": 0.4, "information": 1.0, "codes_in_use": 900, "codes_per_state": 9.0}
    layer = {"precision": 1.0, "channel_precision": 0.5, **more}
    row = {
        "seed": 10,
        "transition": {"plain": 0.98, "codes": 0.96},
        "layers": [layer, layer],
        "forced": {"both": {"nearer": 0.9, "to_other": 0.1, "to_own": 0.3, "before": 0.4}},
    }
    worse = {**row, "layers": [layer, {**layer, "precision": 0.9}]}
    assert all(bar["met"] for bar in study.bars([row]))
    (failed,) = [bar for bar in study.bars([row, worse]) if not bar["met"]]
    assert failed["name"] == "layer 2: precision of a state's code"
    text = study.section({"rows": [row, worse]})
    assert "| layer 2: precision | 1.000 | 0.900 |" in text
    assert "| layer 1: codes in use | 900 | 900 |" in text
    assert verdict(failed) == "NOT MET: layer 2: precision of a state's code: 0.900, at least 0.97"
