"""Train one experiment.

python -m experiments.train --config=configs/quickstart.py --workdir=runs/x [--config.train.steps=100 ...]
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import cli, distributed
from experiments.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/, or file.py:variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go; a run found there is gone on with.")
_INIT_FROM = flags.DEFINE_string("init_from", None, "Start from the parameters of this work directory or state dict.")


def main() -> None:
    values = cli.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: where checkpoints and metrics go, for instance --workdir=runs/x")
    cli.use_compilation_cache()
    distributed.initialize()
    from experiments.build import build
    from experiments.loop import train

    init_from = Path(_INIT_FROM.value) if _INIT_FROM.value else None
    train(build(values), Path(_WORKDIR.value), init_from)


if __name__ == "__main__":
    cli.run(main)
