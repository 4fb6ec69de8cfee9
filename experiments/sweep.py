"""Train and test the arms of a table, each from the same seeds, and write the table's file:

python -m experiments.sweep --config=configs/sweeps/selective_copy.py --workdir=runs/copy --out=runs/copy/table

Finished runs are reused, and several processes may share a work directory, one for each core or device: each takes runs
that no other has, and the last one writes OUT.json and OUT.png as `experiments.pages.curves` does.
"""

from absl import flags

from experiments.common import cli, distributed, runtime
from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, user_path

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs; finished ones are reused.")
_OUT = flags.DEFINE_string("out", None, "Path of the table's JSON file and picture, without suffix.", required=True)


def main() -> None:
    values = cli.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: the directory for the runs, for instance --workdir=runs/sweep")
    workdir, out = user_path(_WORKDIR.value, "--workdir"), user_path(str(_OUT.value), "--out")
    runtime.use_compilation_cache()
    runtime.keep_memory()
    distributed.initialize()  # SIGTERM saves a checkpoint
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(out.parent)
    from experiments.common.config import to_dataclass
    from experiments.evaluation.table import read_run, show, write
    from experiments.studies import sweep

    table = to_dataclass(sweep.Sweep, values, "config")
    table.check()
    directories = sweep.run(table, workdir)
    if directories is None:
        print("other processes work on the remaining runs; the last one to end writes the table")
        return
    runs = {name: read_run(directory) for name, directory in directories.items()}
    write(runs, out)
    show(runs)
    print(f"wrote {out}.json and {out}.png")


if __name__ == "__main__":
    cli.run(main)
