"""What the factor of context of HyperZZW is worth: digits pixel by pixel, two layers without attention.

    python -m experiments.sweep --config=configs/sweeps/hyperzzw.py --workdir=runs/hyperzzw --out=runs/hyperzzw/table

`slow` has the slow loss in addition, `without_context` the kernel of the lag alone. Kernels see the whole picture. The
widths of `ema` and `lstm` make the numbers of parameters equal within 5 %. Data, steps and learning rate are those of
configs/digits.py; nothing was tuned for an arm.
"""

from ml_collections import ConfigDict

from configs import base, digits

# Width of the layers of every arm.
WIDTHS = {"hyperzzw": 64, "without_context": 64, "slow": 64, "ema": 50, "lstm": 26}


def get_config():
    arms = {}
    for name, width in WIDTHS.items():
        mixer = name if name in ("ema", "lstm") else "hyperzzw"
        arms[name] = digits.get_config(f"no_attention,{mixer}")
        arms[name].model.features = width
        if mixer == "hyperzzw":
            arms[name].model.mixer.update(kernel_size=64, context=name != "without_context")
    arms["slow"].objectives = base.objective("slow")
    return ConfigDict({"arms": arms, "first_seed": 0, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
