"""Composition of layers, and nothing else."""
