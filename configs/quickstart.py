"""Short ListOps in a few minutes on two CPU cores. Variants: quickstart.py:no_attention and so on."""

from configs import base
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = base.get_config()
    config.task.name = "short_listops"
    config.task.train_examples = 40_000
    config.task.validation_examples = 2_000
    config.task.test_examples = 2_000
    config.task.data_seed = 0
    config.task.tokens = "8-40"
    config.model.update(layers=2, features=64, key_size=32, value_size=128, window_size=16, max_positions=64)
    config.model.update(block_size=64, norm_placement="post")
    config.optimizer.update(learning_rate=4e-3, warmup_steps=200, weight_decay=0.01)
    config.train.update(steps=2000, batch_size=64, log_every=100, evaluate_every=500, checkpoint_every=500)
    apply_variant(config, variant, tiny=lambda config: None)
    return config
