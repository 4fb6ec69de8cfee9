"""The first bytes of IMDB reviews, pretrained without labels, then classified with 500 of them.

    python -m experiments.train --config=configs/pretrain/text.py --workdir=runs/cae --config.data_dir=DIR
    python -m experiments.train --config=configs/pretrain/text.py:probe --workdir=runs/probe --config.data_dir=DIR \\
        --init_from=runs/cae --init_select='embedding/**,position/**,encoder/**'

Stages in stages.py.
"""

from configs.pretrain import stages

TASK = {"name": "text", "length": 256, "validation_fraction": 0.1, "validation_seed": 0}


def get_config(variant: str = "pretrain"):
    return stages.get_config(variant, TASK, labels=500, sizes=_sizes)


def _sizes(config):
    if config.task.name == "masked":
        config.train.steps = 600
    else:  # 15 epochs
        config.train.update(steps=150, evaluate_every=150, checkpoint_every=150)
