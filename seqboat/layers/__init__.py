"""Flax modules, which hold parameters and call ops."""
