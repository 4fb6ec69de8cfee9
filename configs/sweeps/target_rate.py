"""How close the activation rate comes to the one that is asked, with exact control (docs/router.md): four rates.

    python -m experiments.sweep --config=configs/sweeps/target_rate.py:copying --workdir=runs/rate --out=runs/rate/table

The argument is copying (selective copying), digits (pictures of 8 x 8, pixel by pixel), or else the name of a file of
text, read as bytes; each has its own table. Short runs, of which the last step is tested: what they learn is not the
point.
"""

from ml_collections import ConfigDict

from configs import digits
from configs.lm import bytes as text
from configs.synthetic import selective_copy

RATES = (0.1, 0.25, 0.5, 0.75)


def get_config(data: str = "copying"):
    arms = {f"asked_{rate}".replace(".", "_"): _arm(data, rate) for rate in RATES}
    return ConfigDict({"arms": arms, "first_seed": 50, "seeds": 3, "learning_rates": (), "tuning_seeds": 2})


def _arm(data: str, rate: float) -> ConfigDict:
    recipes = {"copying": _copying, "digits": lambda: digits.get_config("credit_router")}
    config = recipes.get(data, lambda: _bytes(data))()
    config.model.router.update(target_rate=rate, rate_control="exact")
    steps = config.train.steps
    config.train.update(log_every=100, evaluate_every=steps, checkpoint_every=steps)
    return config


def _copying() -> ConfigDict:
    config = selective_copy.get_config("credit_router")
    config.train.steps = 1200
    return config


def _bytes(file: str) -> ConfigDict:
    config = text.get_config("credit_router,tiny")
    config.task.update(files=(file,), length=256, context=128, evaluation_bytes=50_000)
    config.model.update(features=64, key_size=32, value_size=128)
    config.model.mixer.state_size = 8
    config.train.update(steps=800, batch_size=8)
    return config
