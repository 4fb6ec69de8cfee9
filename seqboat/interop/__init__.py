"""Parameters of other implementations."""
