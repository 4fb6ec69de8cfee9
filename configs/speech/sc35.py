"""Speech Commands, all 35 words, the official split, 16,000 raw samples. There is no published recipe: derived from
sc10.py, with its model and optimiser. Chance about 4 %.

Best verified published result: 96.53 % (S5, Smith et al. 2023). Here: docs/results.md.

    python -m experiments.prepare --dataset=speech_commands/sc35 --data_dir=DIR
    python -m experiments.train --config=configs/speech/sc35.py --workdir=runs/sc35 --config.data_dir=DIR
"""

from configs.speech import sc10


def get_config(variant: str = "paper"):
    config = sc10.get_config(variant)
    config.task.words = 35
    return config
