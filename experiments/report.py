"""Show where a trained run's attention goes:  python -m experiments.report --workdir=runs/x [--examples=128]

Writes WORKDIR/report.html, or --out: one self-contained file that opens in any browser.
"""

from absl import flags

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.reports.writer import write_report

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run to report on, or an exported file.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the best one.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "test", "Split of the task to report on.")
_EXAMPLES = flags.DEFINE_integer("examples", 128, "Number of examples of the split to use.", lower_bound=1)
_ELEMENT = flags.DEFINE_integer("element", None, "Element of the first example whose decision is explained.")
_OUT = flags.DEFINE_string("out", None, "Path of the page; by default report.html in the work directory.")
_AT = cli.define_hyper_input()
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data directory, if it has moved since training.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    runtime.use_compilation_cache()
    path = write_report(
        user_path(_WORKDIR.value, "--workdir"),
        _SPLIT.value or "test",
        _STEP.value,
        _EXAMPLES.value or 128,
        _ELEMENT.value,
        _DATA_DIR.value,
        cli.hyper_input(_AT),
        None if _OUT.value is None else user_path(_OUT.value, "--out"),
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
