"""What a trained run is worth, example by example, and what it generates."""
