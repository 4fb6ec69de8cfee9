"""A function of 12 symbols, config.task.template: reverse, shift, dedupe, count, or two, "shift then reverse".

12 slots behind the input ask for the answers. config.task.numbers are the function's own: the lag of shift, 1 to 4, or
the symbol that count counts, 0 to 4.

    python -m experiments.train --config=configs/synthetic/symbol_function.py --workdir=runs/reverse
"""

from configs.synthetic import selective_copy
from configs.variants import apply_variant


def get_config(variant: str = "paper"):
    config = selective_copy.get_config()
    for field in ("symbols", "alphabet", "length"):
        del config.task[field]
    config.task.update(name="symbol_function", template="reverse", numbers=())
    config.model.window_size = 24
    apply_variant(config, variant, tiny=lambda config: None)
    return config
