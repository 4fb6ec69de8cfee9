"""Models composed of layers."""
