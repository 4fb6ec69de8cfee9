"""Standard output and error that survive a closed reader, respect its encoding, and pass no control sequences."""

import contextlib
import os
import sys
import unicodedata
from typing import Any

from rich.console import Console, ConsoleOptions, RenderHook, RenderResult
from rich.segment import Segment

from experiments.common.errors import UserError

# Control and format characters, lone surrogates, and separators of lines and paragraphs.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, but: str = "\n\t") -> str:
    """The text with every control or invisible character, except those in `but`, escaped as in ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c in but or unicodedata.category(c) not in _ESCAPED else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Output:
    """A standard stream for untrusted text: made `printable`, with characters outside its encoding escaped.

    Once writing fails, because the reader is gone or the disk is full, it says so on standard error and discards the
    rest. With `needed`, for a program whose product is its output, a closed pipe ends the program with status 0 and any
    other failure raises UserError.
    """

    def __init__(self, stream: Any, name: str, needed: bool = False):
        self._stream, self._name, self._needed = stream, name, needed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, printable(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    @property
    def rich_proxied_file(self) -> "_Styled":
        """The stream for rich, whose escape sequences are trusted (see `console`)."""
        return _Styled(self)

    def _attempt(self, write: Any, *text: str) -> None:
        try:
            write(*text)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Discards all further output, including what is buffered and what C libraries write."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._needed and isinstance(error, BrokenPipeError):
            sys.exit(0)
        if self._needed:
            raise UserError(f"could not write to {self._name}: {error.strerror}") from error
        if self is not sys.stderr:
            print(f"could not write to {self._name}: {error.strerror}; continuing without it", file=sys.stderr)


class _Styled:
    """An `Output` that passes escape sequences."""

    def __init__(self, output: Output):
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def write(self, text: str) -> int:
        self._output._attempt(self._output._stream.write, text)
        return len(text)


def guard(output_is_needed: bool) -> None:
    """Replaces each standard stream by an `Output`. A stream that was closed at start discards its text."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # otherwise the next opened file gets its descriptor, and with it whatever libraries print
            os.open(os.devnull, os.O_RDWR)
    for stream, name, needed in (("stdout", "standard output", output_is_needed), ("stderr", "standard error", False)):
        current = getattr(sys, stream) or open(os.devnull, "w")  # noqa: SIM115
        setattr(sys, stream, Output(current, name, needed))


def console(**settings: Any) -> Console:
    """A rich console on standard output that escapes the text of its tables and lines."""
    made = Console(file=sys.stdout, **settings)
    made.push_render_hook(_Hook())
    return made


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: Any):
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
