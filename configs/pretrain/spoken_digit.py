"""The first half second of spoken digits, as 100 frames of 5 ms, pretrained without labels, then classified with 100.

    python -m experiments.train --config=configs/pretrain/spoken_digit.py --workdir=runs/cae --config.data_dir=DIR
    python -m experiments.train --config=configs/pretrain/spoken_digit.py:probe --workdir=runs/probe \\
        --config.data_dir=DIR --init_from=runs/cae --init_select='embedding/**,position/**,encoder/**'

Stages in stages.py.
"""

from configs.pretrain import stages

TASK = {"name": "spoken_digit", "length": 100, "frame": 40}


def get_config(variant: str = "pretrain"):
    return stages.get_config(variant, TASK, labels=100, sizes=_sizes)


def _sizes(config):
    if config.task.name == "masked":
        config.train.steps = 600
