"""Hypernetworks that generate a network for every angle of the digits: all arms under equal conditions (`arms.py`).

python -m experiments.study --study=rotation
"""

import functools

from experiments.studies import arms

FOLDER = "hypernetworks"
study = functools.partial(arms.compare, "rotation")
