"""A file that Python 3.11 and jax 0.10.2 exported computes the same logits here, whole and as a stream.

python -m tests.golden.test_export      writes it anew
"""

from pathlib import Path

import jax
import numpy as np
import pytest

import experiments
from experiments.training.exports import write
from tests.helpers import SMALL_MODEL, assert_close, random_like

MODEL, LOGITS = (Path(__file__).with_name(name) for name in ("export.safetensors", "export_logits.npz"))
TOKENS = np.frombuffer(b"A text of no more than a few bytes.", np.uint8)[None].astype(np.int32) + 1
PIECES = 5
LAST = 10  # positions whose logits are kept


@pytest.mark.breadth  # tests/experiments/test_exports.py: test_what_was_exported_is_loaded
def test_the_same_logits_whole_and_in_pieces():
    run = experiments.load(MODEL)
    assert run.meta["versions"] == {"python": "3.11", "jax": "0.10.2"}
    expected = np.load(LOGITS)["logits"]
    assert np.abs(expected).max() > 0.1
    lengths = np.array([TOKENS.shape[1]], np.int32)
    output = jax.jit(run.model.apply)(run.variables, TOKENS, lengths)
    assert 0 < output.layers.active.sum() < 2 * TOKENS.size
    assert_close(output.logits[:, -LAST:], expected)
    stream = jax.jit(lambda *arguments: run.model.apply(run.variables, *arguments, method="stream"))
    state, pieces = run.model.initial_state(1), []
    for piece in np.split(TOKENS, PIECES, axis=1):
        output, state = stream(piece, np.array([piece.shape[1]], np.int32), state)
        pieces.append(output.logits)
    assert_close(np.concatenate(pieces, axis=1)[:, -LAST:], expected)


def make() -> None:
    from configs.lm import bytes as recipe
    from experiments.training.experiment import build_network
    from experiments.training.exports import named

    config = recipe.get_config("credit_router,tiny")
    config.update_from_flattened_dict(
        {**SMALL_MODEL, "task.files": ("text.txt",), "task.length": 32, "task.context": 0}
    )
    values = config.to_dict()
    model, shapes = build_network(values)
    variables = random_like(shapes)
    about = {"names": "seqboat", "step": 7, "best": True, "config": values, "data": {}}
    write(MODEL, named(variables), {**about, "versions": {"python": "3.11", "jax": "0.10.2"}})
    output = jax.jit(model.apply)(variables, TOKENS, np.array([TOKENS.shape[1]], np.int32))
    np.savez_compressed(LOGITS, logits=output.logits[:, -LAST:])


if __name__ == "__main__":
    make()
