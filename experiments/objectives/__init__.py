"""Losses that span layers or need another network: a file, its `Config` and its `Objective`, found by its name."""
