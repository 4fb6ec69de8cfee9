"""The recipes on raw speech."""
