"""Experiments with hypernetworks."""
