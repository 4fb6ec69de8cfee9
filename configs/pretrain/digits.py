"""Handwritten digits of 8 x 8 pixels, as 16 patches of 2 x 2, pretrained without labels, then classified with 50.

    python -m experiments.train --config=configs/pretrain/digits.py --workdir=runs/cae
    python -m experiments.train --config=configs/pretrain/digits.py:probe --workdir=runs/probe \\
        --init_from=runs/cae --init_select='embedding/**,position/**,encoder/**'

Stages in stages.py.
"""

from configs.pretrain import stages

TASK = {"name": "digits", "length": 16, "patches": True}


def get_config(variant: str = "pretrain"):
    return stages.get_config(variant, TASK, labels=50, sizes=_sizes)


def _sizes(config):
    if config.task.name == "masked":
        config.task.span = 1
