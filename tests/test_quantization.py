"""Kernels in fewer bits: what is rounded and by how much, and the model that multiplies by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import grid, random_like, rms

from seqboat.layers.mixers import ema
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.encoder import EncoderConfig, separate
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.quantization import quantize, quantized_products

LAYER = LayerConfig(
    16,
    8,
    24,
    mixer=ema.Config(4),
    window_size=3,
    causal=True,
    position="rotary",
    feed_forward_size=12,
    router=RouterConfig(centered=True),
)
MODEL = LanguageModel(LanguageModelConfig(EncoderConfig(LAYER, 1), 11))
TOKENS = np.random.default_rng(0).integers(11, size=(3, 20))
LENGTHS = np.full(3, 20)
# Relative RMS of logits: each of some ten products moves by at most 1/254 or 2^-9 of its largest terms.
CLOSE = {"float32": 0.0, "bfloat16": 0.02, "int8": 0.03}
KERNELS = {"skip_projection", "projection", "output", "up", "down"}


@pytest.fixture(scope="module")
def variables():
    return random_like(jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS, LENGTHS))


@pytest.fixture(scope="module")
def exact(variables):
    return np.asarray(forward(variables))


@jax.jit
def forward(variables):
    with quantized_products():
        return MODEL.apply(variables, jnp.asarray(TOKENS), jnp.asarray(LENGTHS)).logits


@jax.jit
def step(variables, state, tokens):
    with quantized_products():
        return MODEL.apply(variables, tokens[:, None], jnp.ones(3, jnp.int32), state, method="stream")


def in_steps(variables):
    """Logits of the first elements, one by one, with parameters per layer."""
    apart, state, logits = separate(variables), MODEL.initial_state(3), []
    for tokens in TOKENS.T[:6]:
        output, state = step(apart, state, jnp.asarray(tokens))
        logits.append(output.logits[:, 0])
    return np.stack(logits, 1)


def leaves(tree):
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("dtype", grid(("float32", "bfloat16", "int8"), "float32", "int8"))
def test_only_kernels_are_rounded_to_half_a_unit_of_their_column(variables, dtype):
    quantized = jax.jit(lambda variables: quantize(variables, dtype))(variables)
    before, after = (leaves(jax.device_get(tree)) for tree in (variables, quantized))
    rounded = {path for path in before if after[path].dtype != before[path].dtype}
    assert {path[-2] for path in rounded} == (KERNELS if dtype != "float32" else set())
    assert all(path[-1] == "kernel" for path in rounded)
    assert {path[:-1] for path in set(after) - set(before)} == ({p[:-1] for p in rounded} if dtype == "int8" else set())
    for path in set(before) - rounded:
        np.testing.assert_array_equal(after[path], before[path])
    for path in rounded:
        kernel, found = before[path], after[path].astype(np.float32)
        if dtype == "bfloat16":
            assert (abs(found - kernel) <= 2.0**-8 * abs(kernel)).all()
            continue
        scale = after[(*path[:-1], "kernel_scale")]
        np.testing.assert_allclose(scale, abs(kernel).max(-2) / 127, rtol=1e-6)
        assert (abs(found * scale[:, None] - kernel) <= 0.501 * scale[:, None]).all()
        assert abs(found).max() == 127


@pytest.mark.breadth  # test_only_kernels_are_rounded_to_half_a_unit_of_their_column
@pytest.mark.parametrize("dtype", grid(("float32", "bfloat16", "int8"), "int8"))
def test_a_model_multiplies_by_the_rounded_kernels(variables, exact, dtype):
    """Its logits are near those of float32, and nearer those of the rounded kernels: int8 rounds nothing else."""
    quantized = quantize(variables, dtype)
    whole = np.asarray(forward(quantized))
    assert rms(whole - exact) <= CLOSE[dtype] * rms(exact)
    assert rms(whole - exact) > 0 or dtype == "float32"
    assert rms(in_steps(quantized) - whole[:, :6]) <= 1e-3 * rms(whole)
    if dtype == "int8":
        assert rms(forward(dequantized(quantized)) - whole) <= 1e-3 * rms(whole)


def dequantized(tree):
    if not isinstance(tree, dict):
        return tree
    tree = {name: dequantized(leaf) for name, leaf in tree.items()}
    scale = tree.pop("kernel_scale", None)
    return tree if scale is None else {**tree, "kernel": tree["kernel"] * scale[:, None]}


def test_an_unknown_dtype_is_refused(variables):
    with pytest.raises(ValueError, match=r"^parameter_dtype='int4': must be one of float32, bfloat16, int8$"):
        quantize(variables, "int4")
