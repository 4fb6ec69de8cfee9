"""Pure functions of arrays. One file per operation: reference, fast forms, one dispatcher."""
