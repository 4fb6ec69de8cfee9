"""WikiText-103 (Merity et al. 2016), raw, as bytes; bits per byte. There is no published recipe: derived from
enwik8.py, which differs in nothing but the corpus. Published results are perplexities of words and do not compare.

    python -m experiments.prepare --dataset=wikitext103 --data_dir=DIR
    python -m experiments.train --config=configs/lm/wikitext103.py --workdir=runs/wikitext103 --config.data_dir=DIR
"""

from configs.lm import enwik8


def get_config(variant: str = "paper"):
    config = enwik8.get_config(variant)
    config.task.dataset = "wikitext103"
    return config
