"""Ends of a program that are meant for the person at the terminal."""


class UserError(Exception):
    """What was given, what was expected, what to do, in one line. Programs print it without a trace and exit with 2."""


class Stopped(Exception):
    """Several runs were asked to end before the last: which one stopped where, in one line. Programs print it on
    standard output and exit with 0, as they do where a single run is asked to stop."""


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
