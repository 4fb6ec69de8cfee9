"""Evaluation of trained runs, example by example, and generation."""
