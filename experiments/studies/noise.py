"""Bayesian hypernetworks, from eight random numbers: all arms under equal conditions (`arms.py`).

python -m experiments.study --study=noise
"""

import functools

from experiments.studies import arms

FOLDER = "hypernetworks"
study = functools.partial(arms.compare, "noise")
