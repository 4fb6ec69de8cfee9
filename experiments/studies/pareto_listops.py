"""One hypernetwork for every activation penalty, on short ListOps (`pareto.py`).

python -m experiments.study --study=pareto_listops --workdir=runs/pareto
"""

import functools

from experiments.studies import pareto

FOLDER = "hypernetworks"
study = functools.partial(pareto.compare, "pareto_listops")
