"""A short training run's losses, kept per jax line: a change of numerics shows as a changed line of this file.

To accept one on purpose: `SEQBOAT_WRITE_GOLDEN=1 python -m pytest tests/golden/test_loss_curve.py`.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np

from configs import quickstart
from experiments.training.experiment import build

PATH = Path(__file__).parent / "loss_curve.json"
LINE = ".".join(jax.__version__.split(".")[:2])


def test_loss_curve():
    config = quickstart.get_config()
    config.task.update(train_examples=64, validation_examples=8, test_examples=8)
    config.model.update(features=16, key_size=8, value_size=32, window_size=4, block_size=32)
    config.model.mixer.state_size = 4
    config.optimizer.update(warmup_steps=2)
    config.train.update(batch_size=8, steps=10)
    experiment = build(config.to_dict())
    state = jax.jit(experiment.functions.init)(experiment.seed)
    train = jax.jit(experiment.functions.train)
    losses, before = [], 0.0
    for step in range(6):
        state = train(state, experiment.task.train_batch(step), experiment.seed)
        total = float(state.metrics["loss"][0])
        losses.append((total - before) / 8)
        before = total
    golden = json.loads(PATH.read_text())
    if os.environ.get("SEQBOAT_WRITE_GOLDEN"):
        golden |= {LINE: losses}
        PATH.write_text(json.dumps(golden, indent=1) + "\n")
    np.testing.assert_allclose(losses, golden[LINE], rtol=1e-5)
