"""StackVAE-G: the numbers of the published graph, its terms by hand, KLs by Monte Carlo, scores of a series."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat.layers.terms import collect
from seqboat.models import stackvae
from seqboat.models.stackvae import StackVAE, StackVAEConfig
from tests.helpers import assert_close, normal, random_like

FILE = Path(__file__).parents[1] / "parity/fixtures/wide/stackvae_graph.npz"
ROWS, LENGTH, CHANNELS = 3, 5, 4
SMALL = StackVAEConfig(CHANNELS, LENGTH, hidden=(6, 7), latents=2, node_size=3, neighbours=3, kl=0.5, graph=2.0)
GRAPH = "channel_graph"
INPUTS, LENGTHS = normal(0, ROWS, LENGTH, CHANNELS), jnp.full(ROWS, LENGTH)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(StackVAE(SMALL).init, jax.random.key(0), INPUTS[:, :1], LENGTHS)
    return random_like(shapes["params"])


@pytest.fixture(scope="module")
def trained(params):
    """Output and terms of training, output of evaluation, and that of evaluation on inputs with another channel 0."""

    @jax.jit
    def run(params):
        model, variables = StackVAE(SMALL), {"params": params}
        draw = lambda seed: model.apply(
            variables, INPUTS, LENGTHS, True, mutable=["terms"], rngs={"dropout": jax.random.key(seed)}
        )
        (out, changed), (other, _) = draw(0), draw(1)
        changed_inputs = INPUTS.at[:, :, 0].add(1.0)
        alone = StackVAE(dataclasses.replace(SMALL, share=0.0))
        outputs = [m.apply(variables, x, LENGTHS).logits for m in (model, alone) for x in (INPUTS, changed_inputs)]
        return out, other.logits, collect(changed["terms"]), outputs, stackvae.adjacency(variables, SMALL)

    return run(params)


def test_the_graph_is_that_of_the_published_code():
    with np.load(FILE) as file:
        nodes, kernel, bias = (file[f"p/{name}"] for name in ("node_emb1.weight", "emb_lin1.weight", "emb_lin1.bias"))
        expected = file["adjacency"]
    found = jax.jit(lambda *arrays: stackvae.graph(*arrays, gain=3.0, neighbours=3))(nodes, kernel.T, bias)
    assert_close(found, expected)
    assert_close(found.sum(1), np.ones(9))
    assert np.count_nonzero(expected) < 81 / 2


def test_without_a_channels_own_weight():
    a = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.1, 0.3, 0.6]], np.float32)
    expected = [[0, 0.5, 0.5], [0, 0, 0], [0.25, 0.75, 0]]
    both = jax.jit(lambda a: (stackvae.without_self(a), jax.grad(lambda a: stackvae.without_self(a)[0, 1])(a)))
    found, gradient = both(a)
    assert_close(found, np.array(expected, np.float32))
    assert_close(gradient, np.array([[0, 1, -1], [0, 0, 0], [0, 0, 0]], np.float32))  # d (a / (a + b)), a = b = 1 / 4


def test_evaluation_and_terms_are_the_equations(params, trained):
    out, _, terms, (evaluated, *_), adjacency = trained
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    dense = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]
    x, a = np.asarray(INPUTS, np.float64).swapaxes(1, 2), np.asarray(adjacency, np.float64)
    h = dense("encoder_out", np.maximum(dense("encoder_1", np.maximum(dense("encoder_0", x), 0)), 0))
    mixed = 0.5 * h + 0.5 * np.einsum("cd,bdj->bcj", a, h)
    mean, log_variance = dense("mean", mixed), dense("log_variance", mixed)
    decoded = dense("decoder_out", np.maximum(dense("decoder_1", np.maximum(dense("decoder_0", mean), 0)), 0))
    assert_close(evaluated, decoded.swapaxes(1, 2))
    others = a * (1 - np.eye(CHANNELS))
    others /= np.maximum(others.sum(1, keepdims=True), 1e-12)
    totals = {
        "kl": (np.exp(log_variance) + mean**2 - 1 - log_variance).sum() / 2,
        "graph": np.square(x - np.einsum("cd,bdw->bcw", others, x)).sum(),
    }
    assert set(terms) == set(totals)
    for name, coefficient in (("kl", 0.5), ("graph", 2.0)):
        assert_close(terms[name].total, totals[name])
        assert_close(terms[name].scaled, coefficient * totals[name])
        assert float(terms[name].weight) == INPUTS.size
    assert out.adjacency.shape == (ROWS, CHANNELS, CHANNELS)
    assert_close(out.adjacency[1], adjacency)
    assert float(out.layers.elements.sum()) == ROWS * LENGTH


def test_training_draws_and_evaluation_does_not(trained):
    out, other, _, (evaluated, *_), _ = trained
    assert np.abs(out.logits - other).max() > 1e-3
    assert np.abs(out.logits - evaluated).max() > 1e-3


def test_channels_meet_in_the_graph_alone(trained):
    """With a share of 0 a channel's reconstruction is of itself; the same numbers in all channels give the same."""
    _, _, _, (mixed, mixed_changed, alone, alone_changed), adjacency = trained
    moved = np.abs(mixed_changed - mixed).max((0, 1)) > 1e-6
    assert moved.tolist() == (np.asarray(adjacency)[:, 0] > 0).tolist()
    assert moved.sum() > 1
    assert_close(alone[:, :, 1:], alone_changed[:, :, 1:])
    assert np.abs(alone[:, :, 0] - alone_changed[:, :, 0]).max() > 1e-3


CONTROLS = {vae: dataclasses.replace(SMALL, hidden=(6,), share=0.0, vae=vae) for vae in ("per_channel", "joint")}


@pytest.fixture(scope="module")
def controls():
    """Of both controls parameters, logits and terms, of "per_channel" those of training; the first kernel that it
    starts with; and the logits of one autoencoder for all channels that has the layers of each channel in turn, by the
    same draws."""
    shared = dataclasses.replace(CONTROLS["per_channel"], vae="shared")

    def run(config, params, train):
        variables, rngs = {"params": params}, {"dropout": jax.random.key(7)}
        out, changed = StackVAE(config).apply(variables, INPUTS, LENGTHS, train, mutable=["terms"], rngs=rngs)
        return out.logits, collect(changed["terms"])

    @jax.jit
    def every(key, params):
        start = StackVAE(CONTROLS["per_channel"]).init(key, INPUTS, LENGTHS)["params"]["encoder_0"]["kernel"]
        found = {vae: run(CONTROLS[vae], p, vae == "per_channel") for vae, p in params.items()}
        layers = {name: value for name, value in params["per_channel"].items() if name != GRAPH}
        graph = params["per_channel"][GRAPH]
        return start, found, jax.lax.map(lambda own: run(shared, {**own, GRAPH: graph}, True)[0], layers)

    params = random_like(
        {
            vae: jax.eval_shape(StackVAE(c).init, jax.random.key(0), INPUTS, LENGTHS)["params"]
            for vae, c in CONTROLS.items()
        }
    )
    return params, *every(jax.random.key(3), params)


def divergence(params, x):
    """KL of the latents of x (..., K) by the layers of an encoder, in numpy."""
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    h = dense("encoder_out", np.maximum(dense("encoder_0", x), 0))
    mean, log_variance = dense("mean", h), dense("log_variance", h)
    return mean, (np.exp(log_variance) + mean**2 - 1 - log_variance).sum() / 2


def test_a_vae_for_every_channel_is_one_with_its_layers(controls):
    params, _, found, alone = controls
    (logits, terms), x = found["per_channel"], np.asarray(INPUTS, np.float64)
    for channel in range(CHANNELS):
        assert_close(logits[:, :, channel], alone[channel, :, :, channel])
    assert np.abs(logits[:, :, 1] - alone[0, :, :, 1]).max() > 1e-3
    p = {name: jax.tree.map(np.asarray, value) for name, value in params["per_channel"].items() if name != GRAPH}
    own = [jax.tree.map(lambda leaf, c=c: leaf[c], p) for c in range(CHANNELS)]
    assert_close(terms["kl"].total, sum(divergence(p, x[:, :, c])[1] for c, p in enumerate(own)))


def test_a_vae_for_every_channel_starts_as_one_for_each(controls):
    kernel = np.asarray(controls[1])
    assert kernel.shape == (CHANNELS, LENGTH, 6)
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3, "drawn anew for every channel"
    assert kernel.std() == pytest.approx((2 / LENGTH) ** 0.5, rel=0.3), "the variance is by the inputs of a channel"


def test_a_joint_vae_is_the_equations(controls):
    params, _, found, _ = controls
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["joint"])
    x = np.asarray(INPUTS, np.float64).swapaxes(1, 2).reshape(ROWS, CHANNELS * LENGTH)  # channel after channel
    mean, expected = divergence(p, x)
    assert mean.shape == (ROWS, CHANNELS * SMALL.latents)
    h = np.maximum(mean @ p["decoder_0"]["kernel"] + p["decoder_0"]["bias"], 0)
    decoded = h @ p["decoder_out"]["kernel"] + p["decoder_out"]["bias"]
    logits, terms = found["joint"]
    assert_close(logits, decoded.reshape(ROWS, CHANNELS, LENGTH).swapaxes(1, 2))
    assert_close(terms["kl"].total, expected)


def test_the_kl_is_that_of_monte_carlo():
    mean, log_variance = np.array([0.0, 0.7, -1.5]), np.array([0.0, -1.2, 0.8])
    rng, std = np.random.default_rng(0), np.exp(log_variance / 2)
    z = mean + std * rng.standard_normal((400_000, 3))
    ratio = (z**2 - ((z - mean) / std) ** 2) / 2 - np.log(std)  # log q - log p
    found = np.asarray(jax.jit(stackvae.kl)(mean, log_variance))
    error = ratio.std(0) / np.sqrt(len(z))
    assert found[0] == 0
    assert np.all(np.abs(found - ratio.mean(0)) <= 4 * error + 1e-7), (found, ratio.mean(0), error)
    assert np.all(error < 0.01)


def test_scores_of_a_series_are_those_of_its_windows(params):
    series = np.random.default_rng(1).normal(size=(LENGTH + 4, CHANNELS)).astype(np.float32)
    variables = {"params": params}
    found = stackvae.scores(variables, SMALL, series)
    padded = np.concatenate([np.zeros((LENGTH - 1, CHANNELS), np.float32), series])
    windows = np.stack([padded[t : t + LENGTH] for t in range(len(series))])
    apply = jax.jit(lambda x: StackVAE(SMALL).apply(variables, x, jnp.full(len(series), LENGTH)).logits)
    logits = apply(windows)
    assert_close(found, np.square(series - logits[:, -1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 1}, "channels=1: must be at least 2, for a graph of them"),
        ({"length": 0}, "length=0: must be at least 1"),
        ({"latents": 0}, "latents=0: must be at least 1"),
        ({"node_size": 0}, "node_size=0: must be at least 1"),
        ({"hidden": ()}, r"hidden=\(\): must be one or more widths of at least 1"),
        ({"neighbours": 5}, r"neighbours=5: must be in 1\.\.4, the channels"),
        ({"neighbours": 0}, r"neighbours=0: must be in 1\.\.4, the channels"),
        ({"gain": 0.0}, "gain=0.0: must be positive"),
        ({"share": 1.5}, r"share=1.5: must be in 0\.\.1"),
        ({"kl": -1.0}, "kl=-1.0: must not be negative"),
        ({"graph": float("nan")}, "graph=nan: must not be negative"),
        ({"vae": "joint"}, "share=0.5: must be 0.0 with vae='joint', whose latents cannot be mixed"),
        ({"vae": "per_channel"}, "share=0.5: must be 0.0 with vae='per_channel', whose latents cannot be mixed"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(SMALL, **changes)


def test_windows_of_another_size_are_refused(params):
    with pytest.raises(ValueError, match=r"inputs are \(3, 4, 4\); this model takes \(B, 5, 4\)"):
        jax.eval_shape(StackVAE(SMALL).apply, {"params": params}, INPUTS[:, :4], LENGTHS)
