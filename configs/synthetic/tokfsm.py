"""TokFSM: walks through a random machine of 100 states, each written as two digits, with 5 successors each.

The testbed of docs/dictionaries.md: the true state of every token is known, and there are more states than channels.
The loss cannot go below ln(5) / 2 = 0.805.

    python -m experiments.train --config=configs/synthetic/tokfsm.py:credit_router --workdir=runs/fsm
    python -m experiments.train --config=configs/synthetic/tokfsm.py:credit_router,codebook --init_from=runs/fsm \
        --workdir=runs/fsm_codes

With `codebook` it takes 300 steps at a low rate: at a high one the values run away from the codes.
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    for field in ("symbols", "alphabet"):
        del config.task[field]
    config.task.update(name="tokfsm", states=100, edges=5, length=64)
    config.optimizer.learning_rate = 4e-3
    config.train.update(steps=2000, batch_size=64, log_every=100, evaluate_every=500, checkpoint_every=500)
    apply_variant(config, variant, tiny=lambda config: None)
    if "codebook" in config:
        config.optimizer.learning_rate = 1e-4
        config.train.update(steps=300, evaluate_every=100, checkpoint_every=100)
    return config
