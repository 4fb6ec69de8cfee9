"""How close the activation rate comes to the one that is asked, with exact control (docs/router.md): four rates.

    python -m experiments.sweep --config=configs/sweeps/target_rate.py:copying --workdir=runs/rate --out=runs/rate/table

The argument is copying (selective copying), digits (pictures of 8 x 8, pixel by pixel), or else the name of a file of
text, read as bytes; each has its own table. Short runs, of which the last step is tested: what they learn is not the
point.
"""

from ml_collections import ConfigDict

from configs import base
from configs.lm import bytes as text
from configs.synthetic import selective_copy
from configs.variants import apply_variant

RATES = (0.1, 0.25, 0.5, 0.75)


def get_config(data: str = "copying"):
    arms = {f"asked_{rate}".replace(".", "_"): _arm(data, rate) for rate in RATES}
    return ConfigDict({"arms": arms, "first_seed": 50, "seeds": 3, "learning_rates": (), "tuning_seeds": 2})


def _arm(data: str, rate: float) -> ConfigDict:
    config = {"copying": _copying, "digits": _digits}.get(data, lambda: _bytes(data))()
    config.model.router.update(target_rate=rate, rate_control="exact")
    steps = config.train.steps
    config.train.update(log_every=100, evaluate_every=steps, checkpoint_every=steps)
    return config


def _copying() -> ConfigDict:
    config = selective_copy.get_config("credit_router")
    config.train.steps = 1200
    return config


def _digits() -> ConfigDict:
    config = base.get_config()
    config.task.update(name="digits", length=64)
    config.model.update(layers=2, features=64, key_size=32, value_size=128, window_size=16, max_positions=64)
    config.model.update(block_size=64, remat="none")
    config.optimizer.update(learning_rate=3e-3, warmup_steps=100)
    config.train.update(steps=800, batch_size=32)
    apply_variant(config, "credit_router", tiny=lambda config: None)
    return config


def _bytes(file: str) -> ConfigDict:
    config = text.get_config("credit_router,tiny")
    config.task.update(files=(file,), length=256, context=128, evaluation_bytes=50_000)
    config.model.update(features=64, key_size=32, value_size=128)
    config.model.mixer.state_size = 8
    config.train.update(steps=800, batch_size=8)
    return config
