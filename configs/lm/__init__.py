"""The recipes of language modelling, all of them on bytes."""
