"""The error that is meant for the person at the terminal."""


class UserError(Exception):
    """What was given, what was expected, what to do, in one line. Programs print it without a trace and exit with 2."""
