"""The context autoencoder: what each part may see, its term, and the masked autoencoder it is without a regressor."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat.layers.block import Block, BlockConfig
from seqboat.layers.router import no_decisions
from seqboat.layers.terms import collect
from seqboat.models.classifier import mean_over_length
from seqboat.models.context_autoencoder import ContextAutoencoder, ContextAutoencoderConfig, gather_slots
from seqboat.models.encoder import EncoderConfig
from seqboat.ops.positions import sinusoid
from seqboat.parallel.rules import SINGLE_DEVICE, Layout
from tests.helpers import assert_close, grid, normal, random_like

LENGTH, WIDTH = 8, 8


@dataclasses.dataclass(frozen=True)
class BlendConfig(BlockConfig):
    """A block that compiles in no time: x + the mean of the valid x."""

    features: int = WIDTH
    causal: bool = False
    norm_placement: str = "post"
    dropout: float = 0.0
    dtype: str = "float32"
    layout: Layout = SINGLE_DEVICE

    def block(self):
        return Blend


class Blend(Block):
    def advance(self, x, valid, train, state, threshold=None):
        return x + mean_over_length(x, valid)[:, None], (no_decisions(valid.sum().astype(jnp.float32)), None)


CONFIG = ContextAutoencoderConfig(
    EncoderConfig(BlendConfig(), 1, remat="none"), vocabulary_size=None, channels=4, share=0.5, regressor_heads=2
)
MASK = np.array([[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0, 0, 0]], np.float32)  # and lengths 8 and 5
LENGTHS = jnp.array([8, 5])
MASKED = (MASK > 0) & (np.arange(LENGTH) < np.array([8, 5])[:, None])
VALUES = normal(1, 2, LENGTH, 3)


def inputs(values=VALUES):
    return jnp.concatenate([values, MASK[..., None]], -1)


def variables(config, x=None):
    shapes = jax.eval_shape(ContextAutoencoder(config).init, jax.random.key(0), inputs() if x is None else x, LENGTHS)
    return random_like({"params": shapes["params"]})


def run(config):
    """Output and terms of values, and the gradients by them of the reconstruction of element 1, and of the term."""
    model = ContextAutoencoder(config)

    @jax.jit
    def both(given, values):
        def apply(values):
            out, found = model.apply(given, inputs(values), LENGTHS, True, mutable=["terms"])
            term = collect(found["terms"])["align"].total if config.align else jnp.zeros(())
            return (out.logits[:, 1] @ normal(2, 3), term), (out.logits, found)

        _, pull, (logits, found) = jax.vjp(apply, values, has_aux=True)
        seeds = jnp.array([[1.0, 1.0], [0.0, 0.0]]), jnp.array([0.0, 1.0])
        reconstructed, aligned = jax.lax.map(lambda seed: pull(seed)[0], seeds)  # compiled once
        return logits, found, reconstructed, aligned

    return both


ARMS = {
    "cae": CONFIG,
    "align_0": dataclasses.replace(CONFIG, align=0.0),
    "mae": dataclasses.replace(CONFIG, align=0.0, regressor_layers=0),
}


COMPUTED = {name: run(config) for name, config in ARMS.items()}


@functools.cache
def found(arm):
    """All that `run` computes."""
    return COMPUTED[arm](variables(ARMS[arm]), VALUES)


@pytest.mark.parametrize("arm", grid(tuple(ARMS), "cae"))
def test_reconstructions_see_what_is_visible_alone(arm):
    """Not the masked elements nor the padding; at elements that are not masked there is nothing."""
    logits, _, gradient, _ = found(arm)
    assert (np.asarray(logits)[~MASKED] == 0).all()
    assert (np.abs(np.asarray(logits)[MASKED]).sum(-1) > 0).all()
    seen = np.abs(np.asarray(gradient)).sum(-1)[0] > 0  # of the first sequence, whose element 1 is masked
    assert seen.tolist() == (MASK[0] == 0).tolist()


def test_the_term_is_that_of_the_masked_alone_and_its_target_has_no_gradient():
    _, terms, _, gradient = found("cae")
    term = collect(terms["terms"])["align"]
    assert float(term.weight) == MASKED.sum()
    assert_close(term.scaled, 2.0 * term.total)
    assert float(term.total) > 0
    assert (np.abs(np.asarray(gradient))[MASK > 0] == 0).all()
    assert (np.abs(np.asarray(gradient)[0]).sum(-1)[MASK[0] == 0] > 0).all()


@pytest.mark.breadth  # test_the_term_is_that_of_the_masked_alone_and_its_target_has_no_gradient: its coefficient
def test_the_term_is_0_only_by_its_coefficient():
    """Align 0 computes the same reconstruction and states nothing."""
    assert_close(found("cae")[0], found("align_0")[0])
    assert found("align_0")[1] == {}
    assert found("mae")[1] == {}


def test_the_target_of_the_term_is_the_encoder_of_the_masked_elements():
    """By a regressor that gives the mask token alone: the distance is that to x + the mean of the masked x."""
    given = variables(CONFIG)
    for block in given["params"]["regressor"].values():
        for last in (block["output"], block["feed_forward"]["down"]):
            last.update(jax.tree.map(jnp.zeros_like, last))
    term = collect(COMPUTED["cae"](given, VALUES)[1]["terms"])["align"]
    params = jax.tree.map(np.asarray, given["params"])
    embedding = params["embedding"]["projection"]
    x = np.asarray(VALUES) @ embedding["kernel"] + embedding["bias"]
    x += params["position"]["scale"] * sinusoid(LENGTH, WIDTH)
    total = 0.0
    for row, chosen in zip(x, MASKED, strict=True):
        target = row[chosen] + row[chosen].mean(0)
        total += np.square(params["mask_token"] - target).mean(1).sum()
    assert_close(term.total, np.float32(total))


@pytest.mark.breadth  # test_reconstructions_see_what_is_visible_alone
def test_symbols_and_slots():
    config = dataclasses.replace(CONFIG, vocabulary_size=5, channels=None)
    ids = jnp.concatenate([jnp.ones((2, LENGTH, 1), jnp.int32), jnp.asarray(MASK[..., None], jnp.int32)], -1)
    shape = jax.eval_shape(
        lambda given: ContextAutoencoder(config).apply(given, ids, LENGTHS).logits, variables(config, ids)
    )
    assert shape.shape == (2, LENGTH, 5)
    slots = gather_slots(jnp.asarray(MASK > 0), 4, WIDTH)
    taken = slots.take(VALUES)
    assert slots.at[0].tolist() == [1, 2, 5, 6]
    assert slots.valid.tolist() == [[True] * 4, [True, True, False, False]]
    np.testing.assert_array_equal(slots.spread(taken, LENGTH), VALUES * MASK[..., None])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regressor_layers": -1}, "regressor_layers=-1: must be at least 0"),
        ({"decoder_layers": 0}, "decoder_layers=0: must be at least 1"),
        ({"regressor_heads": 3}, "regressor_heads=3: must divide features=8"),
        ({"align": -1.0}, "align=-1.0: must not be negative"),
        ({"regressor_layers": 0}, "align=2.0: must be 0 with regressor_layers=0, which predict no latents"),
        (
            {"encoder": EncoderConfig(BlendConfig(causal=True), 1)},
            "causal=True: must be False: masked elements are predicted from both sides",
        ),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        dataclasses.replace(CONFIG, **changes)
