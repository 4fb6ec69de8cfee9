"""Meshes, sharding rules, and sequences split over devices."""
