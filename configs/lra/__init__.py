"""The recipes of Long Range Arena."""
