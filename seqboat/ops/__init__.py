"""Pure functions of arrays. One operation a file: the reference first, fast paths after it, one dispatcher that picks."""
