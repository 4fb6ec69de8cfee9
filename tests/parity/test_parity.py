"""Outputs and gradients of the published PyTorch implementation, one test a file (see README.md here).

`SEQBOAT_PARITY_DIR` names a directory whose npz files of the same format run too.
"""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat.interop import published
from seqboat.layers.mixers.ema import EMA, Config
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.ops import ema
from tests.helpers import grid

OUTPUT_TOLERANCE = 1e-5  # absolute
GRADIENT_TOLERANCE = 1e-4  # of the array's largest value

FILES = sorted((Path(__file__).parent / "fixtures").glob("*.npz"))
if os.environ.get("SEQBOAT_PARITY_DIR"):
    FILES += sorted(Path(os.environ["SEQBOAT_PARITY_DIR"]).glob("*.npz"))

NORMS = {"layernorm": "layer", "batchnorm": "batch", "scalenorm": "scale", "rmsnorm": "rms"}
POSITIONS = {"simple": "relative", "rotary": "rotary", "t5": "t5"}


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def layer_config(meta: dict, **fields) -> LayerConfig:
    slot = meta.get("local_pos", False) and meta.get("rel_pos_bias", "simple") == "simple"
    return LayerConfig(
        causal=not meta.get("bidirectional", fields.pop("bidirectional")),
        attention_function=meta.get("attention_activation", "relu2"),
        position="slot" if slot else POSITIONS[meta.get("rel_pos_bias", "simple")],
        max_positions=meta.get("max_positions", 1024),
        norm=NORMS[meta.get("norm_type", fields.pop("norm_type"))],
        norm_placement="pre" if meta.get("prenorm", fields.pop("prenorm")) else "post",
        norm_affine=meta.get("norm_affine", True),
        norm_counts_padding=True,
        router=RouterConfig(temperature_scale=meta.get("init_temp_scale", 1.0)),
        block_size=32,
        **fields,
    )


def layer_case(meta, arrays):
    config = layer_config(
        meta,
        features=meta["d"],
        key_size=meta["z"],
        value_size=meta["h"],
        mixer=Config(meta["N"], meta.get("truncation")),
        window_size=meta.get("window_size", 256),
        bidirectional=False,
        norm_type="layernorm",
        prenorm=True,
    )
    valid = jnp.asarray(~arrays["pad"]) if "pad" in arrays else jnp.ones(arrays["x"].shape[1::-1], bool)

    def apply(variables, x):
        y, taps = SeqBoatLayer(config).apply(
            variables, x.swapaxes(0, 1), valid, meta["train"], mutable=["batch_stats", "taps"]
        )
        return y[0].swapaxes(0, 1), taps

    return functools.partial(published.convert_layer, config=config), apply


def model_case(meta, arrays):
    layer = layer_config(
        meta,
        features=meta["d_model"],
        key_size=meta.get("d_qk", 96),
        value_size=2 * meta["d_model"],
        mixer=Config(meta.get("d_ema", 16)),
        window_size=meta.get("mem_size", 128),
        bidirectional=True,
        norm_type="batchnorm",
        prenorm=False,
    )
    config = ClassifierConfig(EncoderConfig(layer, meta["n_layers"]), meta["d_output"], head="linear")
    lengths = jnp.full(arrays["x"].shape[0], arrays["x"].shape[1])

    def apply(variables, x):
        out, changed = Classifier(config).apply(variables, x, lengths, meta["train"], mutable=["batch_stats"])
        return out.logits, changed

    convert = functools.partial(published.convert_classifier, config=config, input_size=meta["d_input"])
    return convert, apply


def ema_case(meta, arrays):
    module = EMA(meta["N"], not meta["bidirectional"], meta["truncation"])
    valid = jnp.asarray(~arrays["pad"]) if "pad" in arrays else jnp.ones(arrays["x"].shape[1::-1], bool)

    def apply(variables, x):
        return module.apply(variables, x.swapaxes(0, 1), valid).swapaxes(0, 1), {}

    convert = functools.partial(
        published.convert_ema, features=meta["D"], state_size=meta["N"], causal=not meta["bidirectional"]
    )
    return convert, apply


CASES = {"layer": layer_case, "model": model_case, "ema": ema_case}


# In the fast suite, the values and gradients of a layer and of an average, both of two directions, and the values of a
# causal model. Of a causal layer without padding or without an active element: tests/layers/test_naive.py.
BREADTH = (
    "ema_bidir",
    "ema_causal_long",
    "ema_causal_steps",
    "layer_bidir_relu2_batchnorm_eval",
    "layer_bidir_relu2_simple",
    "layer_bidir_softmax_localpos_trunc_pad",
    "layer_causal_relu2_simple_pad_shortbias",
    "layer_causal_softmax_rotary",
    "layer_full_density",
    "layer_one_row_empty",
    "layer_zero_density",
    "model_bidir_batchnorm_eval",
    "model_causal_layernorm_train",
)


# test_agrees_with_the_published_implementation has the values of the other files too.
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem == "model_causal_layernorm_train"], ids=lambda path: path.stem
)
def test_has_the_values_of_the_published_implementation(path):
    meta, arrays = read(path)
    convert, apply = CASES[meta["kind"]](meta, arrays)
    variables = convert(part(arrays, "p:"))
    y, changed = jax.jit(apply)(variables, jnp.asarray(arrays["x"]))
    assert_values(meta, arrays, variables, y, changed)


def assert_values(meta, arrays, variables, y, changed):
    np.testing.assert_allclose(y, arrays["y"], rtol=0, atol=OUTPUT_TOLERANCE)
    if "active" in arrays:
        np.testing.assert_array_equal(changed["taps"]["sparse"]["active"][..., 0], arrays["active"])
    for ours_name, name in (("mean", "running_mean"), ("variance", "running_var")):
        if f"after:{name}" in arrays:
            np.testing.assert_allclose(
                changed["batch_stats"]["norm"][ours_name], arrays[f"after:{name}"], rtol=1e-5, atol=1e-6
            )
    if meta["kind"] == "ema":
        check_kernel_and_steps(meta, arrays, variables["params"])


@pytest.mark.parametrize(
    "path", grid(FILES, *(path for path in FILES if path.stem not in BREADTH)), ids=lambda path: path.stem
)
def test_agrees_with_the_published_implementation(path):
    meta, arrays = read(path)
    convert, apply = CASES[meta["kind"]](meta, arrays)
    weights = part(arrays, "p:")
    variables = convert(weights)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def scalar(params, x):
        y, changed = apply({**variables, "params": params}, x)
        return jnp.vdot(y, arrays["ct"]), (y, changed)

    (_, (y, changed)), (d_params, dx) = jax.jit(scalar)(variables["params"], jnp.asarray(arrays["x"]))
    assert_values(meta, arrays, variables, y, changed)
    assert_gradient(dx, arrays["gx"], np.abs(arrays["gx"]).max(), "x")

    gradients = {name: arrays.get(f"g:{name}", np.zeros_like(array)) for name, array in weights.items()}
    largest = {name: np.full_like(array, np.abs(array).max()) for name, array in gradients.items()}
    leaves = jax.tree_util.tree_leaves_with_path(convert(gradients)["params"])
    scales = jax.tree.leaves(convert(largest)["params"])
    ours = jax.tree.leaves(d_params)
    assert len(ours) == len(leaves)
    for got, (name, expected), scale in zip(ours, leaves, scales, strict=True):
        assert_gradient(got, expected, scale.max(initial=0), jax.tree_util.keystr(name))


def assert_gradient(got, expected, scale, name):
    assert np.shape(got) == np.shape(expected), name
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=GRADIENT_TOLERANCE * scale + 1e-12, err_msg=f"gradient of {name}"
    )


def check_kernel_and_steps(meta, arrays, params):
    params = ema.EMAParams(**{name: jnp.asarray(array) for name, array in params.items()})
    if "kernel" in arrays:
        np.testing.assert_allclose(
            jax.jit(ema.kernel, static_argnums=1)(params, arrays["kernel"].shape[1]),
            arrays["kernel"],
            atol=OUTPUT_TOLERANCE,
        )
    stream = jax.jit(ema.stream)
    state, start = jnp.zeros((arrays["x"].shape[1], meta["D"], meta["N"])), 0
    for index, length in enumerate(meta.get("steps", [])):
        x = arrays["x"][start : start + length]
        state, y = stream(params, state, jnp.asarray(x.swapaxes(0, 1)))
        direct = np.asarray(params.omega) * x
        np.testing.assert_allclose(
            np.asarray(y).swapaxes(0, 1) - direct, arrays[f"step{index}_y"], atol=OUTPUT_TOLERANCE
        )
        np.testing.assert_allclose(state, arrays[f"step{index}_h"], atol=OUTPUT_TOLERANCE)
        start += length
