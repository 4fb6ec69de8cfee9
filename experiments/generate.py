"""Generate from a trained language model:  python -m experiments.generate --workdir=runs/x --prompt="The " --bytes=500

A single sample is printed as it is drawn; several (--batch) are printed one after another at the end. The same seed,
prompt and settings give the same bytes. --force makes a run with codebooks take given codes at every byte.
"""

import sys
import time

import numpy as np
from absl import flags

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.evaluation.sampling import Sampling, Terminal, forced, generate
from experiments.training.restore import load_language_model
from seqboat.quantization import quantize

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of the run, or an exported file; its data is not needed."
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the best one.", lower_bound=0)
_PROMPT = cli.define_bytes("prompt", "", "Text that every sample continues.")
_BYTES = flags.DEFINE_integer("bytes", 500, "Number of bytes to generate per sample.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 1, "Number of samples to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Sampling temperature; 0 always takes the likeliest byte.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Sample from the K likeliest bytes only.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of bytes with at least this total probability.")
_PARAMETER_DTYPE = cli.define_parameter_dtype()
_FORCE = flags.DEFINE_list("force", [], "Codes that a run with codebooks takes at every byte, as SITE:LAYER:CODE.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed for sampling.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    runtime.use_compilation_cache()
    sampling = Sampling(_TEMPERATURE.value or 0.0, _TOP_K.value, _TOP_P.value or 0.0, _SEED.value or 0)
    prompt, batch, count = _PROMPT.value or b"", _BATCH.value or 1, _BYTES.value or 1
    model, variables, step = load_language_model(user_path(_WORKDIR.value, "--workdir"), _STEP.value)
    variables = forced(model, quantize(variables, _PARAMETER_DTYPE.value), _FORCE.value or [])
    drawn = generate(model, variables, prompt, sampling, batch=batch, count=count)
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
    print(f"step {step}{rate}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, output_is_needed=True)
