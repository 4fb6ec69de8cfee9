"""Classifier and language model: composition adds nothing of its own, and configurations say what is wrong."""

import dataclasses
import difflib
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import F32, assert_close, grid, normal, random_like, rms, vanishing

from seqboat.layers.mixers import ema, s4d
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import Encoder, EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig

D, LAYERS, VOCABULARY, CLASSES = 8, 2, 5, 3
BATCH, LENGTH = 3, 9
LENGTHS = jnp.array([9, 4, 0])
LAYER = LayerConfig(D, 4, 6, mixer=ema.Config(4), window_size=3, causal=True, max_positions=8, block_size=4)
DENSE = dataclasses.replace(LAYER, form="dense")  # compiles sooner, for what does not depend on the form
ENCODER = EncoderConfig(DENSE, LAYERS, remat="none")
CLASSIFIER = ClassifierConfig(ENCODER, CLASSES, VOCABULARY, sinusoid=True)
LANGUAGE = LanguageModelConfig(ENCODER, VOCABULARY)
# For numbers that are not finite: the packed form gathers the rows of all sequences.
PACKED = dataclasses.replace(CLASSIFIER, encoder=dataclasses.replace(ENCODER, layer=LAYER))
PACKED_LANGUAGE = dataclasses.replace(LANGUAGE, encoder=PACKED.encoder)
GOLDEN = Path(__file__).parents[1] / "golden" / "parameter_tree.txt"


def tokens(seed=0, length=LENGTH, batch=BATCH):
    return jnp.asarray(np.random.default_rng(seed).integers(VOCABULARY, size=(batch, length)))


def shapes(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def encoder_inputs():
    return normal(0, BATCH, LENGTH, D), jnp.arange(LENGTH)[None] < LENGTHS[:, None]


# The encoder.


# tests/parity: has_the_values_of_the_published_implementation[model_causal_layernorm_train] has several layers.
@pytest.mark.breadth
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_scan_over_layers_equals_a_loop_over_them(norm_placement):
    """Values, stats and gradients of SeqBoat layers that each take their slice of the stacked parameters."""
    config = dataclasses.replace(ENCODER, layer=dataclasses.replace(DENSE, norm_placement=norm_placement))
    x, valid = encoder_inputs()
    params = random_like(shapes(Encoder(config), x, valid))["params"]
    cotangent = jnp.where(valid[..., None], normal(1, BATCH, LENGTH, D), 0)

    def loop(params, x):
        stats = []
        for i in range(LAYERS):
            mine = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            x, decided = SeqBoatLayer(config.layer).apply({"params": mine}, x, valid)
            stats.append(decided)
        if norm_placement == "pre":
            norm = config.layer.make_norm("final_norm")
            x = norm.apply({"params": params["final_norm"]}, x, valid, False)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)

    def scalar(run):
        def value(params, x):
            y, stats = run(params, x)
            return jnp.vdot(y, cotangent), (y[valid], stats)

        return jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, x)

    gradients, out = scalar(lambda params, x: Encoder(config).apply({"params": params}, x, valid))
    expected, wanted = scalar(loop)
    assert 0 < wanted[1].active.sum() < LAYERS * 13
    assert_close(out, wanted)
    assert_close(gradients, expected, floor=vanishing(expected))


# tests/golden/test_loss_curve.py trains with a stored selection.
@pytest.mark.parametrize("kept", grid(("selective", "layer")))
def test_what_is_stored_for_the_backward_pass_changes_no_number(kept):
    x, valid = encoder_inputs()
    variables = random_like(shapes(Encoder(ENCODER), x, valid))
    cotangent = jnp.where(valid[..., None], normal(1, BATCH, LENGTH, D), 0)

    def run(remat):
        model = Encoder(dataclasses.replace(ENCODER, remat=remat))
        value = lambda params: jnp.vdot(model.apply({"params": params}, x, valid)[0], cotangent)
        return jax.jit(jax.value_and_grad(value))(variables["params"])

    expected = run("none")
    assert_close(run(kept), expected, floor=vanishing(expected[1]))


@pytest.mark.breadth  # tests/golden/test_loss_curve.py: losses from the initial numbers of every layer
def test_every_layer_starts_from_its_own_numbers():
    params = jax.jit(Encoder(ENCODER).init)(jax.random.key(0), *encoder_inputs())["params"]["layers"]
    kernels = [params["ssm"][name] for name in ("delta", "alpha", "beta", "gamma", "omega")]
    kernels += [params["skip_projection"]["kernel"], params["gau"]["gamma"], params["gau"]["output"]["kernel"]]
    for leaf in (*kernels, params["sparse"]["configurator"]["logits"]["kernel"]):
        assert leaf.shape[0] == LAYERS
        assert rms(leaf[0] - leaf[1]) > 1e-3


# Invariances of the models.


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def classify(config, variables, inputs, lengths):
    return compiled(Classifier(config))(variables, inputs, lengths)


LINEAR = dataclasses.replace(CLASSIFIER, head="linear", sinusoid=False)


# tests/layers/test_battery.py: test_batch_mates_change_nothing; test_sparse_activation.py:
# test_nan_in_padding_reaches_no_real_element
@pytest.mark.parametrize("config", grid((CLASSIFIER, LINEAR)))
def test_classification_depends_on_the_real_symbols_of_its_sequence_alone(config):
    inputs = tokens()
    variables = random_like(shapes(Classifier(config), inputs, LENGTHS))
    out = classify(config, variables, inputs, LENGTHS)
    assert out.logits.shape == (BATCH, CLASSES)
    assert out.logits.dtype == jnp.float32
    assert out.layers.active.shape == (LAYERS, 1)
    assert_close(out.layers.elements, np.full(LAYERS, 13.0))
    padding = jnp.arange(LENGTH)[None] >= LENGTHS[:, None]
    assert_close(classify(config, variables, jnp.where(padding, 1, inputs), LENGTHS), out)
    longer = jnp.concatenate([inputs[1:2], tokens(1, 4, 1)], 1)
    assert_close(classify(config, variables, longer, LENGTHS[1:2]).logits, out.logits[1:2])
    mates = inputs.at[jnp.array([0, 2])].set(tokens(2, LENGTH, 2))
    assert_close(classify(config, variables, mates, jnp.array([3, 4, 9])).logits[1], out.logits[1])


@pytest.mark.breadth  # tests/ops/test_tables.py
@pytest.mark.parametrize(
    "model", grid((Classifier(PACKED), LanguageModel(PACKED_LANGUAGE)), Classifier(PACKED)), ids=repr
)
@pytest.mark.parametrize("symbol", grid((-1, VOCABULARY), VOCABULARY))
def test_a_symbol_outside_the_vocabulary_is_nan_for_its_sequence_alone_and_nothing_as_padding(model, symbol):
    """Of values and of gradients; and the parallel form of an average does not carry it to batch mates."""
    inputs = tokens()
    variables = random_like(shapes(model, inputs, LENGTHS))
    padding = jnp.arange(LENGTH)[None] >= LENGTHS[:, None]
    logits = lambda inputs: np.asarray(compiled(model)(variables, inputs, LENGTHS).logits)
    expected, wrong = logits(inputs), logits(inputs.at[1, 2].set(symbol))
    assert np.isnan(wrong[1].reshape(-1, wrong.shape[-1])[-1]).all()
    np.testing.assert_array_equal(wrong[0], expected[0])
    np.testing.assert_array_equal(logits(jnp.where(padding, symbol, inputs))[0], expected[0])
    if isinstance(model, Classifier):
        one = jax.jit(jax.grad(lambda params, inputs: model.apply({"params": params}, inputs, LENGTHS).logits.sum()))
        gradients = [one(variables["params"], jnp.where(padding, other, inputs)) for other in (0, symbol)]
        jax.tree.map(np.testing.assert_array_equal, *gradients)


@pytest.mark.breadth  # test_classification_depends_on_the_real_symbols_of_its_sequence_alone
def test_padding_of_numbers_may_be_nan():
    config = dataclasses.replace(PACKED, sinusoid=False, vocabulary_size=None, head="linear")
    model, inputs, (_, valid) = Classifier(config), normal(0, BATCH, LENGTH, 4), encoder_inputs()
    params = random_like(shapes(model, inputs, LENGTHS))["params"]
    one = jax.jit(
        jax.value_and_grad(lambda params, inputs: model.apply({"params": params}, inputs, LENGTHS).logits.sum())
    )
    results = [one(params, jnp.where(valid[..., None], inputs, other)) for other in (0, jnp.nan)]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.breadth  # test_frames.py: test_an_answer_is_the_head_of_the_mean_or_of_every_frame
def test_the_mean_is_taken_over_the_true_length():
    """A linear head over the mean of what the encoder gives the real elements; nothing gives the head's bias."""
    config = dataclasses.replace(CLASSIFIER, head="linear", sinusoid=False, vocabulary_size=None)
    inputs, (_, valid) = normal(0, BATCH, LENGTH, 4), encoder_inputs()
    variables = random_like(shapes(Classifier(config), inputs, LENGTHS))
    params = variables["params"]
    projection, head = params["embedding"]["projection"], params["head"]
    x = jnp.where(valid[..., None], inputs @ projection["kernel"] + projection["bias"][None, None], 0)
    encoded = np.asarray(compiled(Encoder(ENCODER))({"params": params["encoder"]}, x, valid)[0], np.float64)
    means = np.stack([encoded[i, :length].sum(0) / max(length, 1) for i, length in enumerate(LENGTHS.tolist())])
    logits = classify(config, variables, inputs, LENGTHS).logits
    assert_close(logits, means @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))
    assert_close(logits[2], head["bias"])


def generate(variables, inputs, lengths=LENGTHS):
    return compiled(LanguageModel(LANGUAGE))(variables, inputs, lengths)


@pytest.mark.breadth  # test_streaming.py: streams, to which the future is unknown, equal the whole
def test_language_model_depends_on_the_past_alone():
    """By exchanging symbols."""
    inputs = tokens()
    variables = random_like(shapes(LanguageModel(LANGUAGE), inputs, LENGTHS))
    full = jnp.full(BATCH, LENGTH)
    out = generate(variables, inputs, full)
    assert out.logits.shape == (BATCH, LENGTH, VOCABULARY)
    for t in (0, 5):
        later = inputs.at[:, t + 1 :].set(tokens(1)[:, t + 1 :])
        other = generate(variables, later, full).logits
        assert_close(other[:, : t + 1], out.logits[:, : t + 1])
        assert rms(other[:, t + 1 :] - out.logits[:, t + 1 :]) > 1e-3


@pytest.mark.breadth  # test_battery.py: test_no_output_depends_on_a_later_element
def test_gradients_of_an_element_are_of_the_past_alone():
    x, valid = normal(0, BATCH, LENGTH, D), jnp.ones((BATCH, LENGTH), bool)
    encoder = random_like(shapes(Encoder(ENCODER), x, valid))
    value = lambda x, t: Encoder(ENCODER).apply(encoder, x, valid)[0][:, t].sum()
    gradient = jax.jit(jax.grad(value))(x, 4)
    assert rms(gradient[:, 5:]) <= F32 * rms(gradient[:, :5])  # the rounding of the FFT
    assert (np.abs(np.asarray(gradient[:, 4])) > 0).any(1).all()


@pytest.mark.breadth
def test_language_model_ignores_padding_and_batch_mates():
    inputs = tokens()
    variables = random_like(shapes(LanguageModel(LANGUAGE), inputs, LENGTHS))
    out = generate(variables, inputs).logits[1, :4]
    longer = jnp.concatenate([inputs[1:2], tokens(1, 4, 1)], 1)
    assert_close(generate(variables, longer, LENGTHS[1:2]).logits[0, :4], out)
    mates = inputs.at[jnp.array([0, 2])].set(tokens(2, LENGTH, 2))
    assert_close(generate(variables, mates, jnp.array([3, 4, 9])).logits[1, :4], out)


@pytest.mark.breadth  # test_sparse_activation.py, test_step.py: dropout
def test_dropout_needs_training_and_a_key():
    dropping = dataclasses.replace(DENSE, dropout=0.5, hidden_dropout=0.5, attention_dropout=0.5)
    model = LanguageModel(dataclasses.replace(LANGUAGE, encoder=dataclasses.replace(ENCODER, layer=dropping)))
    inputs = tokens()
    variables = random_like(shapes(model, inputs, LENGTHS))
    run = jax.jit(
        lambda key, train: model.apply(variables, inputs, LENGTHS, train, rngs={"dropout": key}).logits,
        static_argnums=1,
    )
    evaluated = run(jax.random.key(0), False)
    assert_close(evaluated, generate(variables, inputs).logits)
    trained = run(jax.random.key(0), True)
    np.testing.assert_array_equal(trained, run(jax.random.key(0), True))
    assert rms(trained - run(jax.random.key(1), True)) > 1e-2
    assert rms(trained - evaluated) > 1e-2


# What is refused.


def layer(**fields):
    return lambda: dataclasses.replace(LAYER, **fields)


REFUSED = [
    (layer(features=0), "features=0: must be at least 1"),
    (layer(key_size=-1), "key_size=-1"),
    (layer(value_size=0), "value_size=0"),
    (lambda: ema.Config(0), "state_size=0: must be at least 1"),
    (layer(max_positions=0), "max_positions=0"),
    (layer(block_size=0), "block_size=0"),
    (layer(window_size=0), "window_size=0: must be at least 1, or None"),
    (lambda: ema.Config(truncation=0), "truncation=0"),
    (layer(dropout=1.0), r"dropout=1.0: must be in \[0, 1\)"),
    (layer(hidden_dropout=-0.1), "hidden_dropout=-0.1"),
    (layer(attention_dropout=1.5), "attention_dropout=1.5"),
    (layer(feed_forward_size=-1), "feed_forward_size=-1"),
    (layer(position="slot", window_size=None), "position='slot' needs a window_size"),
    (layer(position="rotary", key_size=5), "key_size=5: rotary"),
    (lambda: RouterConfig(temperature_scale=0.0), "temperature_scale=0.0: must be positive"),
    (lambda: dataclasses.replace(ENCODER, layers=0), "layers=0"),
    (lambda: dataclasses.replace(CLASSIFIER, classes=0), "classes=0"),
    (lambda: dataclasses.replace(LANGUAGE, vocabulary_size=0), "vocabulary_size=0"),
    (lambda: dataclasses.replace(CLASSIFIER, vocabulary_size=0), "vocabulary_size=0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_impossible_values_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


CHOICES = [
    "attention_function",
    "position",
    "norm",
    "norm_placement",
    "activation",
    "form",
    "dtype",
]


@pytest.mark.parametrize("field", CHOICES)
def test_unknown_choices_are_refused_by_name(field):
    with pytest.raises(Exception, match=rf"{field}") as refused:
        dataclasses.replace(LAYER, **{field: "other"})
    assert "other" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"), [({"causal": False}, "causal=False"), ({"norm": "batch"}, "norm='batch'.*look ahead")]
)
def test_a_language_model_must_not_look_ahead(fields, message):
    encoder = dataclasses.replace(ENCODER, layer=dataclasses.replace(LAYER, **fields))
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(encoder, VOCABULARY)


# Parameter names are interface.

EVERYTHING = dataclasses.replace(LAYER, mixer=s4d.Config(4), feed_forward_size=7, position="t5", norm="rms")
SPEECH = dataclasses.replace(LAYER, causal=False, norm="batch", norm_placement="post", position="slot")
MODELS = {
    "classifier of symbols": (Classifier(CLASSIFIER), tokens()),
    "classifier of numbers, batch norm, centred router": (
        Classifier(
            ClassifierConfig(
                EncoderConfig(dataclasses.replace(SPEECH, router=RouterConfig(centered=True)), LAYERS),
                CLASSES,
                head="linear",
            )
        ),
        jnp.zeros((BATCH, LENGTH, 1)),
    ),
    "language model, S4D, feed-forward": (
        LanguageModel(LanguageModelConfig(EncoderConfig(EVERYTHING, LAYERS), VOCABULARY)),
        tokens(),
    ),
}


def parameter_tree(model, inputs):
    leaves = jax.tree_util.tree_leaves_with_path(shapes(model, inputs, LENGTHS))
    return [f"{'/'.join(key.key for key in path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]


def test_parameter_trees_are_those_of_checkpoints():
    """A changed line is a checkpoint that no longer loads: write the file anew only together with a migration."""
    text = "".join(
        f"# {name}\n" + "".join(f"{line}\n" for line in parameter_tree(*model)) + "\n" for name, model in MODELS.items()
    )
    golden = GOLDEN.read_text()
    assert text == golden, "\n".join(difflib.unified_diff(golden.splitlines(), text.splitlines(), lineterm=""))
