"""Which way a digit moves: an LSTM, SeqBoat, and the control that does not see the order of the frames; small sizes.

    python -m experiments.sweep --config=configs/sweeps/gliding_digits.py --workdir=runs/gliding --out=runs/frames

A digit begins anywhere and leaves the board at one side to come in at the other, so that only the motion tells. Data,
steps and learning rate are those of configs/synthetic/gliding_digits.py for all arms; nothing was tuned for one. The
model has the sizes of `tiny`.
"""

from ml_collections import ConfigDict

from configs.synthetic import gliding_digits

ARMS = {"lstm": "tiny,lstm,no_attention", "seqboat": "tiny", "unordered": "tiny,unordered"}


def get_config():
    arms = {name: gliding_digits.get_config(variant) for name, variant in ARMS.items()}
    for arm in arms.values():
        arm.task.wrap = True
        arm.train.update(steps=1500, evaluate_every=500, checkpoint_every=500)
    return ConfigDict({"arms": arms, "first_seed": 40, "seeds": 5, "learning_rates": (), "tuning_seeds": 2})
