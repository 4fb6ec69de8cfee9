"""Tokens of a codebook of 1024 codes in 32 clusters, in two stages (docs/coarse_to_fine.md). A code has 4.10 bits.

    python -m experiments.train --config=configs/synthetic/codes.py --workdir=runs/codes
    python -m experiments.train --config=configs/synthetic/codes.py:plain --workdir=runs/plain

The default has one layer for the clusters and one for the codes in them. `plain` is one language model of two layers,
`factored` the same with a class-factored head, of widths that make the numbers of parameters equal within 5 %.
`shuffled` gives the model random clusters. `digits`, with `tiny`, has real data: handwritten digits as 16 tokens of a
codebook of 256 (scikit-learn's data), with attention to all of them.
"""

from functools import partial

from ml_collections import ConfigDict

from configs import base
from configs.variants import apply_variant

# Layers, width, and width in `tiny`, of the source and of digits.
SIZES = {"two_stages": (1, 64, 32, 32), "plain": (2, 68, 38, 35), "factored": (2, 44, 22, 26)}


def get_config(variant: str = "paper"):
    names = variant.split(",")
    arm = next((name for name in SIZES if name in names), "two_stages")
    layers, width, *tiny_widths = SIZES[arm]
    config = base.get_config(model="coarse_to_fine" if arm == "two_stages" else "language_model")
    config.task.update(name="codes", length=32, coarse=32, fine=32, edges=4, choices=4, neighbour="next")
    config.task.update(shuffled="shuffled" in names, train_examples=1_000_000, test_examples=1024, data_seed=0)
    config.model.update(layers=layers, features=width, causal=True, key_size=32, value_size=128, window_size=16)
    config.model.mixer.state_size = 8
    config.model.update(norm="layer", norm_placement="pre", max_positions=64, block_size=64, remat="none")
    config.optimizer.update(learning_rate=4e-3, warmup_steps=100, final_learning_rate=1e-4, schedule="cosine")
    config.train.update(steps=4000, batch_size=64, log_every=200, evaluate_every=1000, checkpoint_every=1000)
    if "digits" in names:
        config.task = ConfigDict({"name": "digit_codes", "codes": 256, "coarse": 16, "shuffled": "shuffled" in names})
    if arm == "factored":
        config.model.head = base.head("factored")
    others = [name for name in names if name not in (*SIZES, "shuffled", "digits")]
    apply_variant(config, ",".join(others) or "paper", tiny=partial(tiny, width=tiny_widths["digits" in names]))
    return config


def tiny(config, width):
    """The source without attention, which compiles in a fraction of the time: clusters depend on their neighbours
    alone. Digits are few, and their best step is not the last."""
    config.model.update(features=width, key_size=16, value_size=64)
    config.train.update(steps=1000, batch_size=32, log_every=200, evaluate_every=500, checkpoint_every=500)
    if config.task.name == "codes":
        config.task.update(length=16, coarse=16, fine=16)
        config.model.activation = "never"
    else:
        config.model.activation = "always"
        config.train.update(evaluate_every=100, checkpoint_every=100)
