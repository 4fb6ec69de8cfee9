"""Experiments: values only. A config is a difference from `configs/base.py`."""
