"""Sources of data, generators, tfds builders and the loader."""
