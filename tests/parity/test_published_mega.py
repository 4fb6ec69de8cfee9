"""Outputs and gradients of MEGA's published layer, one test a file (fixtures/wide/README.md).

`SEQBOAT_PARITY_DIR` names a directory whose files mega_*.npz of the same format run too.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, tree_rms

from seqboat.layers.mega import LayerConfig, MegaLayer
from seqboat.layers.mixers import ema

FOLDERS = [Path(__file__).parent / "fixtures" / "wide"]
if os.environ.get("SEQBOAT_PARITY_DIR"):
    FOLDERS.append(Path(os.environ["SEQBOAT_PARITY_DIR"]))
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("mega_*.npz"))]


def read(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def part(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def config_of(arrays, function):
    weights = part(arrays, "p/")
    directions, state_size, _ = weights["move.delta"].shape
    features, values = weights["h_proj.weight"].shape
    chunk, table = int(arrays["chunk"]), weights.get("rel_pos_bias.rel_pos_bias", np.zeros(1))
    return LayerConfig(
        features,
        weights["gamma"].shape[1],
        values,
        chunk=chunk if chunk > 0 else None,
        causal=directions == features,
        attention_function=function,
        position="rotary" if "rel_pos_bias.alpha" in weights else "relative",
        max_positions=(len(table) + 1) // 2,
        mixer=ema.Config(state_size),
    )


def convert(weights):
    """The published names to ours; a Linear's weight there is (out, in)."""
    dense = lambda name: {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}
    if "rel_pos_bias.alpha" in weights:
        vectors = [weights[f"rel_pos_bias.{name}"][0] for name in ("alpha", "beta")]
        position = {"position_vectors": np.stack(vectors)}
    else:
        position = {"position_bias": weights["rel_pos_bias.rel_pos_bias"]}
    return {
        "norm": {"scale": weights["norm.norm.weight"], "offset": weights["norm.norm.bias"]},
        "ssm": {
            **{name: weights[f"move.{name}"][..., 0] for name in ("delta", "alpha", "beta")},
            **{name: weights[f"move.{name}"] for name in ("gamma", "omega")},
        },
        "gau": {
            "gamma": weights["gamma"],
            "beta": weights["beta"],
            "value": dense("v_proj"),
            "projection": dense("mx_proj"),
            "output": dense("h_proj"),
            **position,
        },
    }


# Both directions in chunks: test_mega.py, where chunks and directions are compared with one another.
@pytest.mark.parametrize(
    "path",
    grid(FILES, *(path for path in FILES if path.stem != "mega_bidir_chunk_softmax_pad")),
    ids=lambda path: path.stem,
)
def test_agrees_with_the_published_layer(path):
    arrays = read(path)
    (function,) = [name for name in ("softmax", "relu2", "laplace") if name in path.stem]
    layer = MegaLayer(config_of(arrays, function))
    valid = np.arange(arrays["x"].shape[1])[None] < arrays["lengths"][:, None]

    @jax.jit
    def run(params, x):
        apply = lambda params, x: layer.apply({"params": params}, x, jnp.asarray(valid), False, None, method="advance")
        y, transpose, _ = jax.vjp(lambda *given: apply(*given), params, x, has_aux=True)
        return y, transpose(jnp.asarray(arrays["cotangent"]))

    y, (d_params, dx) = run(convert(part(arrays, "p/")), arrays["x"])
    gradients = part(arrays, "g/")
    assert_close(np.asarray(y)[valid], arrays["y"][valid])
    assert_close(np.asarray(dx)[valid], gradients.pop("x")[valid])
    expected = convert(gradients)
    assert_close(d_params, expected, floor=1e-2 * tree_rms(expected))
