"""The training loop, the only one, and what it is made of."""
