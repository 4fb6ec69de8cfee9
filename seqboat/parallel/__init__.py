"""Meshes, rules, and sequences split over devices."""
