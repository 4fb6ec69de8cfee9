"""text8: 100 million letters and blanks, 90 / 5 / 5 million, bits per character. There is no published recipe: derived
from enwik8.py, which differs in nothing but the corpus.

    python -m experiments.prepare --dataset=text8 --data_dir=DIR
    python -m experiments.train --config=configs/lm/text8.py --workdir=runs/text8 --config.data_dir=DIR
"""

from configs.lm import enwik8


def get_config(variant: str = "paper"):
    config = enwik8.get_config(variant)
    config.task.dataset = "text8"
    return config
