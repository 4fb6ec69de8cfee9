"""Selective copying with transformer blocks and MEGA: what is visible, and what is activated, at equal parameters.

    python -m experiments.sweep --config=configs/sweeps/transformers.py --workdir=runs/blocks --out=runs/blocks/table

`full` sees all 40 positions; `sliding` and those with a router have the window of the SeqBoat arms of
configs/sweeps/selective_copy.py, 16 slots, and MEGA chunks of 16. Widths make the numbers of parameters those of
SeqBoat within 5 %. Data, steps and learning rate are those of that table for all arms; nothing was tuned for one.
"""

from ml_collections import ConfigDict

from configs.synthetic import selective_copy

# Variant and width. A transformer's width is that of two heads.
ARMS = {
    "full": ("transformer", 52),
    "sliding": ("sliding", 52),
    "sma": ("sma_transformer", 52),
    "sma_credit": ("sma_transformer,credit_router", 52),
    "mixture_of_depths": ("sliding,mod", 52),
    "mega": ("mega", 60),
}
NEED = 0.4


def get_config():
    arms = {}
    for name, (variant, width) in ARMS.items():
        arms[name] = selective_copy.get_config(variant)
        arms[name].model.features = width
    arms["mega"].model.chunk = 16
    arms["mixture_of_depths"].model.router.capacity = NEED
    return ConfigDict({"arms": arms, "first_seed": 40, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
