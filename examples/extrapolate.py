"""How far a fact is remembered: a model trained on short sequences reads long ones as streams, at constant memory.

    python -m examples.extrapolate --workdir=runs/induction [--longest=20] [--sequences=16] [--out=extrapolation.json]

For lengths 2^8, 2^10, .. 2^longest of the induction task (`experiments/tasks/induction.py`): the accuracy at the last
token, and how many tokens of a sequence activated attention, in each layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import experiments
from examples import _fit
from experiments.common import cli
from experiments.common.errors import UserError
from experiments.common.files import user_path, write_json
from experiments.common.provenance import command, hardware, versions
from experiments.tasks import induction

PIECE = 4096

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of a run of configs/synthetic/induction.py.", required=True
)
_LONGEST = flags.DEFINE_integer("longest", 20, "Logarithm of the longest length.", lower_bound=8, upper_bound=30)
_SEQUENCES = flags.DEFINE_integer("sequences", 16, "Number of sequences per length.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")


def main() -> None:
    out = user_path(_OUT.value, "--out") if _OUT.value else None
    if out is not None:
        _fit.refuse(out)
    run = experiments.load(user_path(str(_WORKDIR.value), "--workdir"))
    if not isinstance(run.task, induction.Task):
        raise UserError(f"--workdir={_WORKDIR.value}: its task is not induction")
    stream = jax.jit(functools.partial(run.model.apply, method="stream"))
    rows = []
    for power in range(8, int(_LONGEST.value) + 1, 2):
        rows.append(measure(run, stream, 2**power, int(_SEQUENCES.value)))
        print("length {length:>9,}  accuracy {accuracy:.3f}  active tokens {active}".format(**rows[-1]), flush=True)
    if out is not None:
        about = {"command": command(), "versions": versions(), "hardware": hardware(), "step": run.step}
        write_json(out, {**about, "rows": rows})


def measure(run: Any, stream: Any, length: int, sequences: int) -> dict[str, Any]:
    """Accuracy on sequences of a length, and the mean number of active tokens in each layer."""
    task = induction.Task(induction.Config(length=length, alphabet=run.task.config.alphabet), batch_size=1, seed=0)
    rng = np.random.default_rng(length)
    inputs, targets = map(np.stack, zip(*(task.draw(rng) for _ in range(sequences)), strict=True))
    state, size = run.model.initial_state(sequences), min(PIECE, length)
    active, lengths = 0, jnp.full(sequences, size)
    for begin in range(0, length, size):
        output, state = stream(run.variables, inputs[:, begin : begin + size], lengths, state)
        active = active + np.asarray(output.layers.active).sum(-1)
    found = np.asarray(output.logits[:, -1]).argmax(-1)
    accuracy = float((found == targets[:, -1]).mean())
    return {
        "length": length,
        "sequences": sequences,
        "accuracy": accuracy,
        "active": np.round(active / sequences, 2).tolist(),
    }


if __name__ == "__main__":
    cli.run(main)
