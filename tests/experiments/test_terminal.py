"""What is printed: nothing that a terminal would obey, in any encoding, and a lost listener does not end the work."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from experiments.common import terminal
from experiments.common.errors import UserError
from experiments.common.terminal import Output, printable
from tests.helpers import grid

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ± é 文\t\n", "plain ± é 文\t\n"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb\x08\x0b\x0c\x00\x7f", r"a\rb\x08\x0b\x0c\x00\x7f"),
        ("\x9b2J", r"\x9b2J"),  # the one-character form of ESC [
        ("\u202eevil\u200b\u2028", r"\u202eevil\u200b\u2028"),
        ("not UTF-8 \udcff", r"not UTF-8 \udcff"),
        ("a space\u3000and\xa0another", "a space\u3000and\xa0another"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text, shown):
    assert printable(text) == shown
    stream = io.StringIO()
    Output(stream, "standard output").write(text)
    assert stream.getvalue() == shown


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "± ─ \N{GRINNING FACE}"), ("latin-1", r"± \u2500 \U0001f600"), ("ascii", r"\xb1 \u2500 \U0001f600")],
)
def test_what_an_encoding_lacks_is_escaped(encoding, shown):
    raw = io.BytesIO()
    output = Output(io.TextIOWrapper(raw, encoding=encoding), "standard output")
    print("± ─ \N{GRINNING FACE}", file=output, flush=True)
    assert raw.getvalue().decode(encoding) == shown + "\n"


@pytest.mark.parametrize("terminal_like", [False, True])
def test_texts_in_tables_are_escaped_and_styles_are_not(monkeypatch, terminal_like):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Output(stream, "standard output"))
    console = terminal.console(
        force_terminal=terminal_like, width=60, color_system="standard" if terminal_like else None
    )
    table = Table("column", title="\x1b[2J")
    table.add_row("\x1b[31mfield\x1b[0m", style="bold")
    console.print(table)
    console.print("\x1b]0;line\x07", markup=False, highlight=False, soft_wrap=True)
    text = stream.getvalue()
    for escaped in (r"\x1b[2J", r"\x1b[31mfield\x1b[0m", r"\x1b]0;line"):
        assert escaped in text
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    assert ("\x1b[1m" in text) == terminal_like


class Broken(io.StringIO):
    """Fails as a pipe without a reader, or a full disk, from the second write on."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error, self.written = error, 0

    def fileno(self) -> int:
        return self.null

    def write(self, text: str) -> int:
        self.written += 1
        if self.written > 1 and not os.path.sameopenfile(self.fileno(), self.gone):
            raise self.error
        return super().write(text)


@pytest.fixture(
    params=[BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")], ids=["pipe", "disk"]
)
def broken(request, tmp_path):
    stream = Broken(request.param)
    stream.null, stream.gone = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
    yield stream
    os.close(stream.null)
    os.close(stream.gone)


def test_a_lost_listener_is_named_once_and_work_continues(broken, capsys):
    output = Output(broken, "standard output")
    for line in ("first\n", "second\n", "third\n"):
        assert output.write(line) == len(line)
    assert broken.getvalue().startswith("first\n")
    assert os.path.sameopenfile(broken.null, broken.gone), "what libraries print goes nowhere as well"
    assert capsys.readouterr().err == (
        f"could not write to standard output: {broken.error.strerror}; continuing without it\n"
    )


def test_a_program_that_makes_nothing_but_output_ends(broken):
    output = Output(broken, "standard output", needed=True)
    output.write("first\n")
    if isinstance(broken.error, BrokenPipeError):
        with pytest.raises(SystemExit) as ended:
            output.write("second\n")
        assert not ended.value.code, "its reader has seen enough"
    else:
        with pytest.raises(UserError, match=r"^could not write to standard output: No space left on device$"):
            output.write("second\n")


# A program around which everything is real but its work.
PROGRAM = """
import sys
from absl import flags
from experiments.common import cli
from experiments.common.errors import Stopped, UserError

flags.DEFINE_string("end", "", "")

def main():
    for number in range(3000):
        print("line", number, "\\x1b[31m ±", flush=number < 10)
    print("on standard error \\x1b[31m", file=sys.stderr)
    open(sys.argv[1].removeprefix("--end="), "w").write("done")
    if "refused" in sys.argv[1]:
        raise UserError("refused \\x1b[31m")
    if "stopped" in sys.argv[1]:
        raise Stopped("asked to stop")

if __name__ == "__main__":
    cli.run(main)
"""


ENDS = [
    ("| head -n 1", "file", 0, "could not write to standard output: Broken pipe; continuing without it"),
    (">/dev/full", "file", 0, "could not write to standard output: No space left on device; continuing without it"),
    (">/dev/full", "refused", 2, r"error: refused \x1b[31m"),
    (">/dev/full", "stopped", 0, "continuing without it"),
    (">&-", "file", 0, r"on standard error \x1b[31m"),
    (">&-", "refused", 2, r"error: refused \x1b[31m"),
    ("2>&-", "refused", 2, ""),
    ("2>/dev/full", "refused", 2, ""),
    (">&- 2>&- <&-", "refused", 2, ""),
    (">/dev/null", "stopped", 0, r"on standard error \x1b[31m"),
    ("| PYTHONIOENCODING=latin-1 cat >/dev/null", "file", 0, r"on standard error \x1b[31m"),
]


@pytest.mark.parametrize(("redirection", "name", "status", "said"), grid(ENDS, ENDS[0]))
def test_a_program_ends_as_its_work_did(tmp_path, redirection, name, status, said):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"set -o pipefail; {sys.executable} {tmp_path}/program.py --end={tmp_path}/{name} {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=100, cwd=REPOSITORY
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert (tmp_path / name).read_text() == "done"
