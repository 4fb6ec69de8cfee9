"""Two stages: the exact likelihood by enumeration, its limits, samples against probabilities, and what is refused."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.evaluation.sampling import Sampling
from experiments.tasks import codes, induction
from experiments.training.footprint import step_flops
from experiments.training.models import build_model, encodes_inputs
from seqboat.layers.config import LayerConfig
from seqboat.layers.mixers import elman
from seqboat.models.coarse_to_fine import CoarseToFine, CoarseToFineConfig, sample
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel
from seqboat.parallel.rules import SINGLE_DEVICE
from tests.helpers import assert_close, random_like

V, CLUSTERS = 6, (0, 1, 1, 2, 2, 2)
OF = ((0, -1, -1), (1, 2, -1), (3, 4, 5))  # the symbols of every cluster
LAYER = LayerConfig(8, 4, 6, mixer=elman.Config(), window_size=3, causal=True, activation="never", max_positions=8)
CONFIG = CoarseToFineConfig(EncoderConfig(LAYER, 1, remat="none"), V, CLUSTERS)
# Every sequence of three symbols after a first one.
ALL = np.array(list(itertools.product([0], range(V), range(V), range(V))), np.int32)
FULL = np.full(len(ALL), 4, np.int32)


@functools.cache
def make(config=CONFIG):
    model = CoarseToFine(config)
    return model, random_like(jax.eval_shape(model.init, jax.random.key(0), ALL[:1], FULL[:1]))


@pytest.fixture(scope="module")
def run():
    """The logits of symbols (216, 4), and what both stages compute from the labels alone; compiled once."""
    model, variables = make()

    @jax.jit
    def compiled(variables, symbols, lengths):
        labels = jnp.asarray(CLUSTERS)[symbols]
        params = {name: variables["params"][name] for name in ("embedding", "encoder")}
        coarse = LanguageModel(CONFIG.coarse).apply({"params": params}, labels, lengths).logits
        fine = model.apply(variables, labels[:, 1:], method="symbols_given")
        return model.apply(variables, symbols, lengths).logits, jax.nn.log_softmax(coarse), fine

    return lambda symbols, lengths: compiled(variables, symbols, lengths)


@pytest.fixture(scope="module")
def computed(run):
    return run(ALL, FULL)


@pytest.fixture(scope="module")
def logits(computed):
    return computed[0]


def likelihoods(logits):
    own = np.take_along_axis(np.asarray(logits, np.float64)[:, :-1], ALL[:, 1:, None], -1)[..., 0]
    return np.exp(own.sum(1))


def test_probabilities_sum_to_1_at_every_position_and_over_all_sequences(logits):
    np.testing.assert_allclose(np.exp(np.asarray(logits, np.float64)).sum(-1), 1, atol=1e-5)
    p = likelihoods(logits)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 * p.min()  # not the uniform distribution


def test_sums_over_the_symbols_of_labels_are_the_first_stage(computed):
    """A language model over the labels, by the same parameters; and the second stage does not see symbols."""
    logits, coarse, fine = computed
    labels = np.asarray(CLUSTERS)[ALL]
    own = np.exp(np.take_along_axis(np.asarray(coarse[:, :-1]), labels[:, 1:, None], -1)).prod((1, 2))
    p, names = likelihoods(logits), [tuple(row) for row in labels.tolist()]
    for name in set(names):
        rows = [index for index, other in enumerate(names) if other == name]
        assert p[rows].sum() == pytest.approx(own[rows[0]], rel=1e-4)
    # The second stage alone computes the same shares of the symbols of a cluster.
    rank = np.asarray([0, 0, 1, 0, 1, 2])[ALL[:, 1:]]
    shares = np.exp(np.take_along_axis(np.asarray(fine), rank[..., None], -1)).prod((1, 2))
    np.testing.assert_allclose(p, own * shares, rtol=1e-4)


@pytest.mark.breadth  # test_probabilities_sum_to_1_at_every_position_and_over_all_sequences
def test_samples_have_these_probabilities(logits):
    model, variables = make()
    count = 5000
    drawn = np.asarray(sample(model, variables, jnp.zeros(count, jnp.int32), jax.random.key(1), 3))
    expected = count * likelihoods(logits)
    found = np.bincount(drawn @ [V * V, V, 1], minlength=len(ALL))
    often = expected >= 5  # the others are one class of the test
    found, expected = (np.append(each[often], each[~often].sum()) for each in (found, expected))
    freedom = often.sum()
    chi_squared = (np.square(found - expected) / expected).sum()
    assert abs(chi_squared - freedom) < 4 * np.sqrt(2 * freedom)
    again = sample(model, variables, jnp.zeros(count, jnp.int32), jax.random.key(1), 3)
    np.testing.assert_array_equal(again, drawn)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=1)], ids=["temperature", "top_k"])
def test_the_likeliest_labels_get_their_likeliest_symbols(computed, sampling):
    _, coarse, fine = map(np.asarray, computed)
    model, variables = make()
    drawn = np.asarray(sample(model, variables, jnp.zeros(2, jnp.int32), jax.random.key(1), 3, sampling.restrict))
    (row,) = np.flatnonzero((ALL[:, 1:] == drawn[0]).all(1))
    labels = coarse[row, :-1].argmax(-1)
    assert labels.tolist() == [CLUSTERS[symbol] for symbol in drawn[0]]
    symbols = np.asarray(OF)[labels, fine[row].argmax(-1)]
    np.testing.assert_array_equal(drawn, [symbols, symbols])


# tests/models/test_heads.py: a_factored_head_is_a_plain_one_in_the_limits.
@pytest.mark.breadth
def test_one_cluster_for_every_symbol_is_a_plain_language_model():
    config = dataclasses.replace(CONFIG, clusters=tuple(range(V)))
    model, variables = make(config)
    params = {name: variables["params"][name] for name in ("embedding", "encoder")}

    @jax.jit
    def run(variables, params, inputs, lengths):
        plain = LanguageModel(config.coarse).apply({"params": params}, inputs, lengths).logits
        return model.apply(variables, inputs, lengths).logits, jax.nn.log_softmax(plain)

    assert_close(*run(variables, params, ALL[:3], FULL[:3]))


# tests/models/test_heads.py: a_factored_head_is_a_plain_one_in_the_limits.
@pytest.mark.breadth
def test_with_one_cluster_all_is_in_the_second_stage():
    """Scores are a plain softmax of its features, which see no symbol, as there is one label."""
    model, variables = make(dataclasses.replace(CONFIG, clusters=(0,) * V))

    @jax.jit
    def run(variables, inputs, lengths):
        known = jnp.array([[0, 0, 0, 1]])  # labels, and the end marker
        x = model.apply(variables, known, lengths[:1], False, method=lambda model, *args: model.fine(*args)[0])
        head = variables["params"]["fine"]["head"]
        return model.apply(variables, inputs, lengths).logits, jax.nn.log_softmax(
            x @ head["kernel"] + head["bias"][None, None]
        )

    got, plain = run(variables, ALL[100:103], FULL[:3])
    assert_close(got, jnp.broadcast_to(plain, got.shape))


@pytest.mark.breadth  # test_probabilities_sum_to_1_at_every_position_and_over_all_sequences; tests/ops/test_tables.py
def test_padding_changes_nothing_symbols_that_are_not_there_give_nan_and_gradients_are_finite(run, logits):
    symbols, lengths = ALL.copy(), FULL.copy()
    symbols[1, 2:], lengths[1:3] = [99, -7], [2, 0]
    symbols[3:5] = [0, 2, V, 1], [0, -1, 1, 1]
    model, variables = make()

    def objective(variables):
        logits = model.apply(variables, jnp.asarray(ALL), jnp.asarray(lengths)).logits
        own = jnp.take_along_axis(logits[:, :-1], jnp.asarray(ALL)[:, 1:, None], -1)
        return own[-1].sum()

    padded, other, gradient = run(symbols, lengths)[0], run(ALL, lengths)[0], jax.jit(jax.grad(objective))(variables)
    assert_close(padded[:2], other[:2])
    assert_close(padded[0], logits[0])
    assert np.isnan(padded[3:5]).any(-1).all(), "the labels on both sides see a symbol that is not there"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    silent = [
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not leaf.any()
    ]
    assert not silent


def test_stats_are_those_of_both_stages():
    model = CoarseToFine(dataclasses.replace(CONFIG, fine_layers=2))
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), ALL[:2], FULL[:2])
    assert out.layers.probability.shape[0] == 3
    assert out.logits.shape == (2, 4, V)


def test_programs_count_both_stages_and_look_into_neither():
    """FLOPs are those of a language model over the labels, of the fine layers, and of V scores."""
    model, batch = make()[0], {"inputs": ALL, "lengths": FULL}
    where = SimpleNamespace(layout=SINGLE_DEVICE)
    flops = lambda network: step_flops(SimpleNamespace(network=network, partition=where), batch, 0.5)
    fine = CONFIG.fine.layer.multiplications(4, 0.5) + LAYER.features * V
    assert flops(model) == flops(LanguageModel(CONFIG.coarse)) + 6 * ALL.size * fine
    assert not encodes_inputs(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fine_layers": 0}, "fine_layers=0: must be at least 1"),
        ({"clusters": (0, 1)}, "clusters: must be one for each of the 6 symbols, not 2"),
        ({"clusters": (0, 1, 1, 3, 3, 3)}, "clusters: must be numbered from 0 without gaps"),
        ({"encoder": EncoderConfig(dataclasses.replace(LAYER, causal=False), 1)}, "causal=False: a language model"),
    ],
)
def test_mistakes_are_named_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_a_task_gives_the_clusters():
    values = {"name": "coarse_to_fine", "layers": 1, "features": 8, "key_size": 4, "value_size": 8, "causal": True}
    values |= {"mixer": {"name": "ema"}}
    task = codes.Config(coarse=3, fine=2, edges=1, choices=1)
    assert build_model(values, task).config.clusters == (0, 0, 1, 1, 2, 2, 3, 3)
    with pytest.raises(UserError, match=r"^config.model.name='coarse_to_fine': this task .* it has no clusters$"):
        build_model(values, induction.Config())
    with pytest.raises(UserError, match=r"^config.model.clusters: not set here, the task decides it$"):
        build_model({**values, "clusters": (0,)}, task)
    with pytest.raises(UserError, match=r"^config.model.fine_layers=0: must be at least 1$"):
        build_model({**values, "fine_layers": 0}, task)
