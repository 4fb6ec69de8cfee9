"""Generate from a trained language model:  python -m experiments.generate --workdir=runs/x --prompt="The " --bytes=500

A single sample is printed as it is drawn; several (--batch) are printed one after another at the end. The same seed,
prompt and settings give the same bytes. --force makes a run with codebooks take given codes at every byte.

A model of tokens in two stages (`coarse_to_fine`) draws whole sequences from the beginning, by its own distribution. It
takes --tokens, --batch and --seed, and prints a line for each sequence, of its tokens' numbers in the vocabulary:

    python -m experiments.generate --workdir=runs/codes --batch=8
"""

import sys
import time

import numpy as np
from absl import flags

from experiments.common import cli, runtime
from experiments.common.errors import UserError, require
from experiments.common.files import user_path
from experiments.evaluation.sampling import Sampling, Terminal, draw_tokens, forced, generate
from experiments.training.restore import load_generator
from seqboat.models.coarse_to_fine import CoarseToFine
from seqboat.quantization import quantize

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of the run, or an exported file; its data is not needed."
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the best one.", lower_bound=0)
_PROMPT = cli.define_bytes("prompt", "", "Text that every sample continues.")
_BYTES = flags.DEFINE_integer("bytes", 500, "Number of bytes to generate per sample.", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "Number of tokens to draw per sample of a model in two stages; by default as in a sequence of its task.",
    lower_bound=1,
)
_BATCH = flags.DEFINE_integer("batch", 1, "Number of samples to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Sampling temperature; 0 always takes the likeliest byte or token."
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Sample from the K likeliest bytes or tokens only.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set with at least this total probability.")
_PARAMETER_DTYPE = cli.define_parameter_dtype()
_FORCE = flags.DEFINE_list("force", [], "Codes that a run with codebooks takes at every byte, as SITE:LAYER:CODE.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed for sampling.")
# What a model of tokens in two stages does not read.
_OF_BYTES = (_PROMPT, _BYTES, _PARAMETER_DTYPE, _FORCE)


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    runtime.use_compilation_cache()
    sampling = Sampling(_TEMPERATURE.value or 0.0, _TOP_K.value, _TOP_P.value or 0.0, _SEED.value or 0)
    prompt, batch, count = _PROMPT.value or b"", _BATCH.value or 1, _BYTES.value or 1
    run = load_generator(user_path(_WORKDIR.value, "--workdir"), _STEP.value)
    if isinstance(run.model, CoarseToFine):
        kind = f"{_WORKDIR.value} holds a model of tokens in two stages, which draws whole sequences as they come"
        for flag in _OF_BYTES:
            require(not flag.present, f"--{flag.name}: {kind}; remove --{flag.name}")
        for row in draw_tokens(run, sampling, batch=batch, count=_TOKENS.value):
            print(*row.tolist())
        print(f"step {run.step}", file=sys.stderr)
        return
    require(not _TOKENS.present, f"--tokens: {_WORKDIR.value} holds a model of bytes; take --bytes")
    variables = forced(run.model, quantize(run.variables, _PARAMETER_DTYPE.value), _FORCE.value or [])
    drawn = generate(run.model, variables, prompt, sampling, batch=batch, count=count)
    if batch == 1:
        terminal = Terminal()
        print(terminal.text(prompt), end="", flush=True)
    first, samples = None, []
    for row in drawn:
        first = first or time.monotonic()
        if batch == 1:
            print(terminal.text(row.tobytes()), end="", flush=True)
        else:
            samples.append(row)
    if batch == 1:
        print(terminal.text(b"", final=True))
    for sample in np.stack(samples, axis=1) if samples else ():
        print(f"{'-' * 80}\n{Terminal().text(prompt + sample.tobytes(), final=True)}")
    seconds = time.monotonic() - (first or 0)
    rate = f", {batch * (count - 1) / seconds:,.0f} bytes/s" if count > 1 else ""
    print(f"step {run.step}{rate}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, output_is_needed=True)
