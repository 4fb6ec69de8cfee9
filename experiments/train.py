"""Train one experiment.

python -m experiments.train --config=configs/quickstart.py --workdir=runs/x [--config.train.steps=100 ...]
"""

from typing import Any

import jax
from absl import flags

from experiments.common import cli, distributed, runtime
from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.training.claims import owned

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for checkpoints and metrics; an existing run is resumed.")
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Work directory, exported file or state dict to initialise parameters from."
)
_INIT_SELECT = flags.DEFINE_list(
    "init_select", None, "Globs of the parameters that --init_from gives; the others start as the seed has them."
)
_SEEDS = flags.DEFINE_integer("seeds", None, "Number of seeds to train and test, in WORKDIR/seed_N.", lower_bound=1)


def main() -> None:
    values = cli.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: where checkpoints and metrics go, for instance --workdir=runs/x")
    workdir = user_path(_WORKDIR.value, "--workdir")
    if _INIT_SELECT.value and not _INIT_FROM.value:
        raise UserError("--init_select: chooses parameters of --init_from=DIR, which is missing")
    runtime.use_compilation_cache()
    runtime.keep_memory()
    distributed.initialize()
    from experiments.evaluation.seeds import SUMMARY_FILE, run_seeds
    from experiments.training.experiment import build
    from experiments.training.loop import source_of, train

    if not _SEEDS.present:
        init_from = source_of(workdir, _INIT_FROM.value)  # reject a bad source before data are read
        train(build(values), workdir, init_from, _INIT_SELECT.value or ())
        return
    if _INIT_FROM.present:
        raise UserError("--seeds trains from several random initialisations: remove --init_from")

    def show(summary: dict[str, Any]) -> None:
        selection_metric = summary["metrics"][summary["selection_metric"]]
        mean = "not finite" if selection_metric["mean"] is None else f"{selection_metric['mean']:.4f}"
        error = "" if selection_metric["standard_error"] is None else f" +- {selection_metric['standard_error']:.4f}"
        if jax.process_index() == 0:
            print(f"{summary['selection_metric']} {mean}{error} over seeds {summary['seeds']}", flush=True)

    with owned(workdir):  # for the summary; each training owns its seed's directory
        run_seeds(values, workdir, _SEEDS.value or 1, shown=show)
    if jax.process_index() == 0:
        print(f"wrote {workdir / SUMMARY_FILE}")


if __name__ == "__main__":
    cli.run(main)
