"""Evaluate a trained run:  python -m experiments.evaluate --workdir=runs/x [--step=N] [--split=test] [--against=runs/y]

    python -m experiments.evaluate --workdir=runs/lm --streams=1      a corpus in one pass with carried state

Prints, and writes to evaluation_SPLIT_STEP.json or --out, metrics with standard errors over examples, each class's
precision and recall, examples and elements a second; against another run on the same examples, a paired test and what
it says.
One pass is written to one_pass_STREAMS_SPLIT_STEP.json. One stream is exact: every byte is scored after all before it;
of several each begins empty, `config.task.context` bytes before its part.
"""

import sys

from absl import flags, logging

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, user_path, write_json
from experiments.evaluation.evaluator import measure_run, result_file, show

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's work directory; nothing else is needed.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint: the best one by default.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "test", "The split of the task to evaluate on.")
_OUT = flags.DEFINE_string("out", None, "The JSON file to write, instead of one in the work directory.")
_AGAINST = flags.DEFINE_string("against", None, "Work directory of another run, to compare its best step with this.")
_AT = cli.define_hyper_input()
_STREAMS = flags.DEFINE_integer("streams", None, "A corpus in one pass, as so many streams; 1 is exact.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    runtime.use_compilation_cache()
    runtime.keep_memory()
    workdir, split = user_path(_WORKDIR.value, "--workdir"), _SPLIT.value or "test"
    against = None if _AGAINST.value is None else user_path(_AGAINST.value, "--against")
    out = None if _OUT.value is None else user_path(_OUT.value, "--out")
    if out is not None:
        refuse_unwritable(out.parent)
    elif workdir.is_dir():
        try:
            refuse_unwritable(workdir)
        except UserError as error:  # other people's run: the numbers are worth seeing
            logging.warning("%s, else the result is shown and not kept", error)
    at, streams = cli.hyper_input(_AT), _STREAMS.value
    result = measure_run(workdir, split, _STEP.value, _DATA_DIR.value, against, at=at, streams=streams)
    show(result)
    sys.stdout.flush()
    out = out or workdir / result_file(result)
    write_json(out, result)
    print(f"written to {out}")


if __name__ == "__main__":
    cli.run(main)
