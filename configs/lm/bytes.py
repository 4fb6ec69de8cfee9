"""Any text files, as bytes, one after the other, split by fractions. Derived from enwik8.py.

Plain, or packed by gzip, xz or bzip2, or alone in a zip: their first bytes tell, not their names.

python -m experiments.train --config=configs/lm/bytes.py:tiny --workdir=runs/mine --config.task.files='("a.txt",)'
"""

from configs import base
from configs.lm import enwik8


def get_config(variant: str = "paper"):
    config = enwik8.get_config(variant)
    config.task.dataset = base.placeholder(str)
    return config
