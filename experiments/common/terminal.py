"""Standard output and error: they outlive their listener, fit its encoding, and carry no command to a terminal."""

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
    """The text with each character that a terminal obeys or hides, except those of `but`, as its escape: ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c in but or unicodedata.category(c) not in _ESCAPED else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Output:
    """A standard stream for text from anywhere: `printable`, and what its encoding lacks as an escape.

    Once it cannot be written, because its reader is gone or its disk is full, it is said on standard error and nothing
    more is written. With `needed`, for a program whose work is its output: a closed pipe ends the program with status
    0, as its reader has seen enough, and anything else raises UserError.
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
        """Where rich writes: its styles and cursor movements are our own, see `console`."""
        return _Styled(self)

    def _attempt(self, write: Any, *text: str) -> None:
        try:
            write(*text)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """The rest goes nowhere, also what the stream still holds and what C libraries write."""
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
    """An `Output` that takes escape sequences."""

    def __init__(self, output: Output):
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def write(self, text: str) -> int:
        self._output._attempt(self._output._stream.write, text)
        return len(text)


def guard(output_is_needed: bool) -> None:
    """Puts an `Output` for each of the standard streams. One that the program was started without goes nowhere."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # else the next file that is opened gets its number, and all that libraries print
            os.open(os.devnull, os.O_RDWR)
    for stream, name, needed in (("stdout", "standard output", output_is_needed), ("stderr", "standard error", False)):
        current = getattr(sys, stream) or open(os.devnull, "w")  # noqa: SIM115
        setattr(sys, stream, Output(current, name, needed))


def console(**settings: Any) -> Console:
    """A console on standard output that escapes what the texts in its tables and lines hold."""
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
