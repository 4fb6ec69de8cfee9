"""Digits turned by any angle in 0 .. 90 degrees; a hypernetwork makes the classifier for each. Seconds on a CPU.

    python -m experiments.train --config=configs/hyper/rotation.py:mip --workdir=runs/rotation

Arms as in configs/hyper/arms.py, and sgd or adam: --config=configs/hyper/rotation.py:default,sgd
"""

from configs import base
from configs.hyper.arms import apply_arm


def get_config(variant: str = "mip"):
    arm, optimizer = [*variant.split(","), "adam"][:2]
    config = base.get_config(model="mlp")
    config.task.name = "digits"
    config.hypernetwork = base.hyper("rotation")
    config.hypernetwork.evaluations = 17
    config.hypernetwork.network.hidden = (16, 32, 32)
    _optimizer(config, optimizer)
    config.train.update(steps=800, batch_size=64, log_every=100, evaluate_every=100, checkpoint_every=100)
    apply_arm(config, arm)
    return config


def _optimizer(config, name: str) -> None:
    if name not in ("adam", "sgd"):
        raise ValueError(f"unknown optimiser {name!r}: there are adam, sgd")
    config.optimizer.update(schedule="cosine", warmup_steps=0, weight_decay=0.0, clip_norm=None)
    if name == "sgd":
        config.optimizer.update(name="sgd", b1=0.9, learning_rate=0.01)
    else:
        config.optimizer.update(name="adamw", b1=0.9, b2=0.999, learning_rate=1e-3)
