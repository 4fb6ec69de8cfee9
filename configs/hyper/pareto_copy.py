"""One SeqBoat for every penalty on attention, on selective copying, where attention is worth most.

python -m experiments.train --config=configs/hyper/pareto_copy.py --workdir=runs/pareto
"""

from configs.hyper.pareto_listops import conditioned
from configs.synthetic import selective_copy


def get_config(variant: str = "mip"):
    config = selective_copy.get_config("credit_router")
    config.model.router.eviction_cost = False  # as in docs/hypernetworks.md
    config.train.steps = 2400
    return conditioned(config, variant, penalty=0.5)
