"""Data sources, generators, tfds builders and the loader."""
