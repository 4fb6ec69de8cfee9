"""Shared by all programs: flags, one-line errors, files, processes."""
