"""Which start trains a deep plain network: 32 layers of width 64 on digits, and the control of 4 layers.

    python -m experiments.sweep --config=configs/sweeps/depth.py --workdir=runs/depth --out=docs/_data/results/depth

Data, steps and learning rate are the same for all arms; nothing was tuned for one of them. One arm alone, for other
programs, is --config=configs/sweeps/depth.py:selu.
"""

from ml_collections import ConfigDict

from configs import base

# Activation and initialiser of every arm.
ARMS = {
    "relu_he": ("relu", "he"),
    "relu_lecun": ("relu", "lecun"),
    "tanh": ("tanh", "critical"),
    "selu": ("selu", "lecun"),
    "gelu_critical": ("gelu", "critical"),
}


def get_config(name: str = ""):
    arms = {start: arm(32, *fields) for start, fields in ARMS.items()}
    arms |= {f"{start}_4_layers": arm(4, *ARMS[start]) for start in ("relu_he", "selu")}
    if name:
        return arms[name]
    return ConfigDict({"arms": arms, "first_seed": 0, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})


def arm(layers: int, activation: str, initializer: str) -> ConfigDict:
    config = base.get_config(model="mlp")
    config.task.name = "digits"
    config.model.update(hidden=(64,) * layers, activation=activation, initializer=initializer)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=0, weight_decay=0.0, clip_norm=None)
    config.train.update(steps=400, batch_size=64, log_every=100, evaluate_every=100, checkpoint_every=400)
    return config
