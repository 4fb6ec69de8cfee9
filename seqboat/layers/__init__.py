"""Flax modules: they hold parameters and call ops."""
