"""One hypernetwork for every activation penalty, on selective copying (`pareto.py`).

python -m experiments.study --study=pareto_copy --workdir=runs/pareto
"""

import functools

from experiments.studies import pareto

FOLDER = "hypernetworks"
study = functools.partial(pareto.compare, "pareto_copy")
