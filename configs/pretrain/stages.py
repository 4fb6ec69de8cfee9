"""The stages of every recipe for pretraining, by config argument: --config=configs/pretrain/digits.py:probe

    pretrain     a context autoencoder of the inputs, without labels; the default
    mae          a masked autoencoder instead: the same without its regressor
    probe        a linear classifier of the mean of the encoder's outputs, which stay as they are
    fine_tune    the same, all of it trained

The last two start from a run of the first by --init_from=DIR --init_select=embedding/**,position/**,encoder/**. Without
these flags probe is that of a random encoder, and fine_tune trains from scratch.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import base
from configs.variants import apply_variant

STAGES = ("pretrain", "mae", "probe", "fine_tune")


def get_config(variant: str, task: dict, labels: int, sizes: Callable[[ConfigDict], None]) -> ConfigDict:
    """`task` is that of the inputs, of which the later stages have `labels`; `sizes` sets what the recipe has of its
    own. `variant` is a stage, and any names of `configs.variants`."""
    names = variant.split(",")
    stage = next((name for name in names if name in STAGES), "pretrain")
    labelled = stage in ("probe", "fine_tune")
    config = base.get_config("classifier" if labelled else "context_autoencoder")
    config.model.update(layers=2, features=32, key_size=16, value_size=64)
    config.model.update(activation="always", window_size=None, position="none", norm="layer")
    config.optimizer.update(learning_rate=2e-3, schedule="cosine", weight_decay=0.01)
    if labelled:
        config.task.update(**task, labels=labels)
        config.model.update(sinusoid=True, head="linear")
        config.train.update(
            steps=300, batch_size=min(labels, 50), log_every=50, evaluate_every=300, checkpoint_every=300
        )
        config.optimizer.warmup_steps = 30
    else:
        config.task.update(name="masked", of=task, share=0.5, span=4)
        config.train.update(steps=1500, batch_size=32, log_every=100, evaluate_every=300, checkpoint_every=300)
    if stage == "mae":
        config.model.update(regressor_layers=0, align=0.0)
    if stage == "probe":
        config.optimizer.update(learning_rate=0.1, learning_rate_scales=(("^(?!head)", 0.0),))
    sizes(config)
    others = [name for name in names if name not in STAGES]
    if others:
        apply_variant(config, ",".join(others), tiny=_tiny)
    return config


def _tiny(config: ConfigDict) -> None:
    config.model.update(features=16, key_size=8, value_size=32)
    config.train.update(steps=200, log_every=50, evaluate_every=200, checkpoint_every=200)
