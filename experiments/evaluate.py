"""Evaluate a trained run:  python -m experiments.evaluate --workdir=runs/x [--step=N] [--split=test] [--against=runs/y]

    python -m experiments.evaluate --workdir=runs/lm --streams=1      a corpus in one pass with carried state
    python -m experiments.evaluate --workdir=runs/lm --parameter_dtype=int8      beside the same parameters in float32
    python -m experiments.evaluate --workdir=runs/fsm --splice=runs/fsm_m2       with a dictionary's reconstructions

Prints metrics with standard errors over examples, per-class precision and recall, and examples and elements per second,
and writes them to evaluation_SPLIT_STEP.json or --out. With --against, adds a paired test against another run on the
same examples.
--workdir and --against also take a file of experiments.export; its results go next to it.
--splice takes a dictionary of this run's activations (docs/dictionaries.md), or a transcoder (docs/transcoders.md):
metrics with them replaced by their reconstructions, beside those as they are and with their mean, and a paired test
against the run as it is, or that of --against; written to splice_SPLIT_STEP_DICTIONARY.json.
A one-pass evaluation is written to one_pass_STREAMS_SPLIT_STEP.json. With one stream it is exact: every byte is scored
given all bytes before it. With several, each stream starts empty, `config.task.context` bytes before its part.
"""

import sys

from absl import flags, logging

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, user_path, write_json
from experiments.evaluation.evaluator import measure_run, result_file, show
from experiments.training.restore import beside

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run to evaluate, or an exported file.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the best one.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "test", "Split of the task to evaluate on.")
_OUT = flags.DEFINE_string("out", None, "Path of the JSON file; by default a file in the work directory.")
_AGAINST = flags.DEFINE_string("against", None, "Another run to compare with, at its best step.")
_AT = cli.define_hyper_input()
_STREAMS = flags.DEFINE_integer(
    "streams", None, "Evaluate a corpus in one pass, as N streams; 1 is exact.", lower_bound=1
)
_SPLICE = flags.DEFINE_string("splice", None, "Work directory, or exported file, of a dictionary of this run.")
_PARAMETER_DTYPE = cli.define_parameter_dtype()
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data directory, if it has moved since training.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    runtime.use_compilation_cache()
    runtime.keep_memory()
    workdir, split = user_path(_WORKDIR.value, "--workdir"), _SPLIT.value or "test"
    against = None if _AGAINST.value is None else user_path(_AGAINST.value, "--against")
    splice = None if _SPLICE.value is None else user_path(_SPLICE.value, "--splice")
    out = None if _OUT.value is None else user_path(_OUT.value, "--out")
    if out is not None:
        refuse_unwritable(out.parent)
    elif workdir.exists():
        try:
            refuse_unwritable(beside(workdir, "evaluation.json").parent)
        except UserError as error:  # somebody else's run: show the numbers all the same
            logging.warning("%s; without it the result is printed and not saved", error)
    options = {"at": cli.hyper_input(_AT), "streams": _STREAMS.value, "parameter_dtype": _PARAMETER_DTYPE.value}
    result = measure_run(workdir, split, _STEP.value, _DATA_DIR.value, against, splice=splice, **options)
    show(result)
    sys.stdout.flush()
    out = out or beside(workdir, result_file(result))
    write_json(out, result)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
