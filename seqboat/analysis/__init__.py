"""What networks do to signals and gradients: pure functions of networks given as functions."""
