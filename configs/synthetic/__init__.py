"""Generated tasks for studies."""
