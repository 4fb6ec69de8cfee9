"""Outputs and gradients of public implementations of mixers and blocks, one test a file (fixtures/wide/README.md).

`SEQBOAT_PARITY_DIR` names a directory whose npz files of the same format run too, where their name begins with one of
CASES.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid

from seqboat.ops import cells

Arrays = dict[str, np.ndarray]


def part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def elman(weights, z, valid, state, reverse):
    return cells.elman(weights["recurrent"], z, valid, state, reverse)


def lstm(weights, z, valid, state, reverse):
    return cells.lstm(cells.LSTMParams(weights["recurrent"]), z, valid, (state, state), reverse)


def gru(weights, z, valid, state, reverse):
    params = cells.GRUParams(weights["recurrent"], weights["recurrent_bias"])
    return cells.gru(params, z, valid, state, reverse)


def cell_case(cell):
    """PyTorch's packed sequences: every direction is compared, and the final states, which it lists by direction."""

    def case(arrays):
        length = arrays["x"].shape[1]
        valid = jnp.arange(length)[None] < jnp.asarray(arrays["lengths"])[:, None]

        def direction(p, x, suffix):
            kernel, recurrent = (p[f"weight_{kind}_l0{suffix}"].T for kind in ("ih", "hh"))
            bias, recurrent_bias = (p[f"bias_{kind}_l0{suffix}"] for kind in ("ih", "hh"))
            width = recurrent.shape[0]
            weights = {"recurrent": recurrent}
            if cell is gru:  # its candidate keeps the second bias apart
                weights["recurrent_bias"] = recurrent_bias[2 * width :]
                recurrent_bias = recurrent_bias.at[2 * width :].set(0)
            z = x @ kernel + (bias + recurrent_bias)[None, None]
            y, state = cell(weights, z, valid, jnp.zeros((x.shape[0], width)), reverse=bool(suffix))
            return jnp.where(valid[..., None], y, 0), state

        def forward(p, x):
            y, states = zip(*(direction(p, x, s) for s in ("", "_reverse") if f"bias_ih_l0{s}" in p), strict=True)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            names = ("state_c", "state_h") if cell is lstm else ("state",)
            return jnp.concatenate(y, -1), dict(zip(names, jax.tree.leaves(stacked), strict=True))

        return forward

    return case


# The beginning of a file's name -> a function of its arrays, which returns forward(parameters, x) -> (y, other arrays
# of the file by name). Parameters are named as in the file.
CASES: dict[str, Callable[[Arrays], Callable]] = {
    "elman": cell_case(elman),
    "lstm": cell_case(lstm),
    "gru": cell_case(gru),
}


def known(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.npz") if path.stem.split("_")[0] in CASES)


FILES = known(Path(__file__).parent / "fixtures" / "wide")
if os.environ.get("SEQBOAT_PARITY_DIR"):
    FILES += known(Path(os.environ["SEQBOAT_PARITY_DIR"]))


# elman_bidir has both directions.
@pytest.mark.parametrize(
    "path", grid(FILES, *(path for path in FILES if path.stem != "elman_causal")), ids=lambda path: path.stem
)
def test_agrees_with_the_public_implementation(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    forward = CASES[path.stem.split("_")[0]](arrays)

    @jax.jit
    def run(p, x):
        y, transpose, others = jax.vjp(forward, p, x, has_aux=True)
        return y, others, transpose(jnp.asarray(arrays["cotangent"]))

    y, others, (dp, dx) = run(part(arrays, "p/"), arrays["x"])
    gradients = part(arrays, "g/")
    expected_dx = gradients.pop("x")
    assert_close(y, arrays["y"])
    assert_close(others, {name: arrays[name] for name in others})
    assert_close(dp, gradients)
    assert_close(dx, expected_dx)


def test_every_known_prefix_has_a_file():
    assert {path.stem.split("_")[0] for path in FILES} == set(CASES)
