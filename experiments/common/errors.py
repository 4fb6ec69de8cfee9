"""Exceptions that end a program with a message for the user."""


class UserError(Exception):
    """One line: what was given, what was expected, what to do. Programs print it without a traceback and exit with
    2."""


class Stopped(Exception):
    """A series of runs was asked to stop early: one line says which run stopped where. Programs print it on standard
    output and exit with 0, as they do when a single run is asked to stop."""


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
