"""Which way a digit moves: an LSTM, SeqBoat, and the control that does not see the order of the frames.

    python -m experiments.sweep --config=configs/sweeps/gliding_digits.py --workdir=runs/gliding --out=runs/frames

A digit begins anywhere and leaves the board at one side to come in at the other, so that only the motion tells. Data,
steps and learning rate are those of configs/synthetic/gliding_digits.py for all arms; nothing was tuned for one.
"""

from ml_collections import ConfigDict

from configs.synthetic import gliding_digits

ARMS = {"lstm": "lstm,no_attention", "seqboat": "paper", "unordered": "unordered"}


def get_config():
    arms = {name: gliding_digits.get_config(variant) for name, variant in ARMS.items()}
    for arm in arms.values():
        arm.task.wrap = True
    return ConfigDict({"arms": arms, "first_seed": 40, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
