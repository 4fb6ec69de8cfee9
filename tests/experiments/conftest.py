"""A tiny experiment on short ListOps: a step compiles in seconds and runs in milliseconds."""

from collections.abc import Callable
from typing import Any

import pytest

from configs import quickstart

TINY = {
    "task.train_examples": 200,
    "task.validation_examples": 40,
    "task.test_examples": 40,
    "model.layers": 2,
    "model.features": 8,
    "model.key_size": 4,
    "model.value_size": 16,
    "model.state_size": 2,
    "model.window_size": 4,
    "model.block_size": 16,
    "optimizer.warmup_steps": 4,
    "train.steps": 6,
    "train.batch_size": 8,
    "train.log_every": 3,
    "train.evaluate_every": 4,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 3,
    "train.tensorboard": False,
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """tiny({"train.steps": 8}) is the values of the tiny config with that difference."""

    def values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
        config = quickstart.get_config()
        config.update_from_flattened_dict({**TINY, **(changes or {})})
        return config.to_dict()

    return values
