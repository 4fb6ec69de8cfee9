"""Experiments of more than one run, whose tables and pictures are in docs/."""
