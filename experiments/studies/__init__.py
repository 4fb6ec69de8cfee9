"""Studies of more than one run, whose tables and figures are in docs/."""
