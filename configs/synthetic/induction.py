"""Induction with one trigger among 64 tokens, then streams of a million: what followed the trigger? Chance is 1 in 16.

    python -m experiments.train --config=configs/synthetic/induction.py:credit_router --workdir=runs/induction
    python -m experiments.train --config=configs/synthetic/induction.py:credit_router --workdir=runs/induction_sparse \
        --init_from=runs/induction --config.train.activation_penalty=0.1 --config.optimizer.learning_rate=1e-3 \
        --config.train.steps=800 --config.train.evaluate_every=400 --config.train.checkpoint_every=400
    python -m examples.extrapolate --workdir=runs/induction_sparse

Two tokens of a sequence matter. A window of 8 active tokens reaches over any distance if few others are active: the
penalty of the second run sees to that. From the start it closed the router on three seeds of five (docs/router.md).
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    del config.task["symbols"]
    config.task.update(name="induction", length=64, alphabet=16)
    config.model.position = "none"
    config.model.window_size = 8
    config.train.update(steps=2000, evaluate_every=1000, checkpoint_every=1000)
    apply_variant(config, variant, tiny=lambda config: None)
    return config
