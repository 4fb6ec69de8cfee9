"""A transcoder: sparse features of m that compute what a layer's feed-forward network does (arXiv 2406.11944).

    python -m experiments.train --config=configs/interp/transcoder.py --config.task.run=runs/fsm --workdir=runs/fsm_ff1

A dictionary (`configs/interp/dictionary.py`) of config.task.site whose targets are config.task.target_site. The run
needs a config.model.feed_forward_size.
"""

from configs.interp import dictionary


def get_config():
    config = dictionary.get_config()
    config.task.target_site = "feed_forward_out"
    config.model.auxiliary = 0.0  # the model sees no targets, and so no error that dead features could explain
    return config
