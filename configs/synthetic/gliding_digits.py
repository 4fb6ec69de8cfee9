"""Which way a digit moves, from 8 frames: every frame through convolutions, then a sequence model (docs/frames.md).

    python -m experiments.train --config=configs/synthetic/gliding_digits.py --workdir=runs/gliding
    python -m experiments.evaluate --workdir=runs/gliding

Variants: those of every recipe, as lstm,no_attention for the published kind of sequence model; `unordered`, the
control: every frame alone, and the mean of all; `per_frame`, an answer at every frame. With --config.task.wrap=True
only the motion tells. There is no published recipe. Chance is 1 in 4, and 1 in 2 for a model that does not see order.
"""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config("frames")
    config.task.update(name="gliding_digits", length=8, size=16, wrap=False, answer="clip")
    config.task.update(train_examples=20_000, test_examples=2_000, data_seed=0)
    config.model.update(layers=2, features=64, key_size=32, value_size=128, window_size=8, max_positions=8)
    config.model.update(block_size=64, causal=True, norm="layer")
    config.optimizer.update(learning_rate=4e-3, schedule="cosine", warmup_steps=50, weight_decay=0.01)
    config.train.update(steps=1500, batch_size=64, log_every=100, evaluate_every=500, checkpoint_every=500)
    names = variant.split(",")
    own = [name for name in names if name in ("unordered", "per_frame")]
    if "per_frame" in own:
        config.task.answer = "frame"
    others = [name for name in names if name not in own]
    if others:
        apply_variant(config, ",".join(others), tiny=_tiny)
    if "unordered" in own:
        config.model.activation = "never"
        config.model.mixer = base.mixer("elman")
        config.model.mixer.recurrence = False
    return config


def _tiny(config):
    """One layer, and 400 steps."""
    config.model.update(layers=1, features=32, key_size=16, value_size=64, filters=(8, 16))
    config.train.update(steps=400, batch_size=32, log_every=100, evaluate_every=200, checkpoint_every=200)
    config.task.test_examples = 1_000
