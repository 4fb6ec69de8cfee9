"""Pure functions of arrays. One operation a file: reference, fast paths, one dispatcher."""
