"""Values and gradients of the published LRU, S5, SSD and Mamba-2, one test a file (see fixtures/wide/README.md).

`SEQBOAT_PARITY_DIR` names a directory whose npz files of the same format run too.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid

from seqboat.layers.mixers import lru, s5, ssd
from seqboat.ops.ssd import chunked
from seqboat.parallel.rules import SINGLE_DEVICE

TOLERANCE = 1e-5  # relative RMS


def part(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def gradients_of(fn, cotangent, *args):
    """fn(*args), and the gradients of the scalar product with the cotangent."""

    @jax.jit
    def run(*args):
        y, transpose = jax.vjp(fn, *args)
        return y, transpose(cotangent)

    return run(*map(lambda tree: jax.tree.map(jnp.asarray, tree), args))


def check(config, convert, causal, arrays):
    """`convert(parameters) -> ours`, differentiable: its transpose turns our gradients into those of the file."""
    mixer = config.make(causal, SINGLE_DEVICE)

    def apply(params, x):
        return mixer.apply({"params": convert(params)}, x, jnp.ones(x.shape[:2], bool))

    got = gradients_of(apply, arrays["cotangent"], part(arrays, "p/"), arrays["x"])
    gradients = part(arrays, "g/")
    assert_close(got, (arrays["y"], (gradients, gradients.pop("x"))), TOLERANCE)


def lru_case(name, arrays):
    def convert(p):
        return {
            "nu_log": p["nu_log"],
            "theta_log": p["theta_log"],
            "gamma_log": p["gamma_log"],
            "b": jnp.stack([p["B_re"].T, p["B_im"].T], 1),
            "c": jnp.stack([p["C_re"].T, p["C_im"].T]),
            "d": p["D"],
        }

    check(lru.Config(state_size=len(arrays["p/nu_log"])), convert, True, arrays)


def s5_case(name, arrays):
    """The published directions share everything but C; ours have parameters of their own."""
    causal = "p/C" in arrays

    def convert(p):
        def direction(c, d):
            return {
                "a_real_log": jnp.log(-p["Lambda_re"]),
                "a_imag": p["Lambda_im"],
                "dt_log": p["log_step"][:, 0],
                "b": p["B"].transpose(1, 2, 0),
                "c": c.transpose(2, 1, 0),
                "d": d,
            }

        if causal:
            return direction(p["C"], p["D"])
        both = direction(p["C1"], p["D"]), direction(p["C2"], jnp.zeros_like(p["D"]))
        return jax.tree.map(lambda *pair: jnp.stack(pair), *both)

    config = s5.Config(
        state_size=len(arrays["p/Lambda_re"]), discretization="bilinear" if "bilinear" in name else "zoh"
    )
    check(config, convert, causal, arrays)


def ssd_case(name, arrays):
    """The published function takes B and C of each head: one head at a time, for ours shares them."""

    def apply(x, log_decay, b, c):
        def head(x, log_decay, b, c, state):
            y, after = chunked(x[:, :, None], log_decay[..., None], b, c, state[:, None], 8)
            return y[:, :, 0], after[:, 0]

        axes = (2, 2, 2, 2, 1)
        return jax.vmap(head, axes, (2, 1))(x, log_decay, b, c, arrays["initial"])

    inputs = [arrays[key] for key in ("X", "A", "B", "C")]
    cotangent = arrays["cotangent"], np.ones_like(arrays["final"])  # the file's scalar is sum(y * c) + sum(final)
    got = gradients_of(apply, cotangent, *inputs)
    expected = tuple(arrays[f"g/{key}"] for key in ("X", "A", "B", "C"))
    assert_close(got, ((arrays["y"], arrays["final"]), expected), TOLERANCE)


def mamba2_case(name, arrays):
    heads, (channels, _, width) = len(arrays["p/A_log"]), arrays["p/conv1d.weight"].shape
    inner, features = len(arrays["p/norm.weight"]), arrays["x"].shape[-1]

    def convert(p):
        return {
            "in_projection": p["in_proj.weight"].T,
            "convolution": p["conv1d.weight"][:, 0].T,
            "convolution_bias": p["conv1d.bias"],
            "dt_bias": p["dt_bias"],
            "a_log": p["A_log"],
            "d": p["D"],
            "norm_scale": p["norm.weight"],
            "out_projection": p["out_proj.weight"].T,
        }

    config = ssd.Config(
        expand=inner // features,
        head_size=inner // heads,
        state_size=(channels - inner) // 2,
        convolution=width,
        chunk_size=7,  # does not divide the length
    )
    check(config, convert, True, arrays)


CASES = {"lru": lru_case, "s5": s5_case, "ssd": ssd_case, "mamba2": mamba2_case}
DIRECTORIES = [Path(__file__).parent / "fixtures" / "wide"]
if os.environ.get("SEQBOAT_PARITY_DIR"):
    DIRECTORIES.append(Path(os.environ["SEQBOAT_PARITY_DIR"]))
FILES = [path for directory in DIRECTORIES for path in sorted(directory.glob("*.npz"))]
FILES = [path for path in FILES if path.stem.split("_")[0] in CASES]


# test_ssd.py: test_the_block_equals_its_equations; test_linear_recurrences.py: both discretisations of s5.
@pytest.mark.parametrize(
    "path",
    grid(FILES, *(path for path in FILES if path.stem not in ("mamba2", "s5_bidir_bilinear"))),
    ids=lambda path: path.stem,
)
def test_agrees_with_the_published_implementation(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    CASES[path.stem.split("_")[0]](path.stem, arrays)
