"""Paths that a user gives, which are all read here, and files that are written whole or not at all."""

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.common.errors import UserError

# Bytes. Linux takes 4095; the rest is room for what we write below a directory.
LONGEST = 3800
_ADDRESS = re.compile(r"\s*[\w.+@-]+:/")  # one slash: a Path has joined the two of gs://bucket


def user_path(value: str | os.PathLike, what: str) -> Path:
    """The local path that `value` names, with ~ expanded; it need not exist. Reading the result again changes nothing.

    `what` names it in errors: "--workdir". Raises UserError for what no file system here can take: an address
    (gs://...), the home of an unknown user, a name that is empty, too long, not UTF-8, or below a file.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"{what}={value!r}: expected the path of a file or directory")
    text = os.fspath(value)
    if "\0" in text or not _is_utf8(text):
        raise UserError(f"{what}={text!r}: expected a path in UTF-8 without NUL; rename it, or take another")
    if _ADDRESS.match(text):
        raise UserError(f"{what}={text}: expected a path on a mounted file system, not an address; mount it")
    try:
        path = Path(os.path.expanduser(text))
        if text.startswith("~") and str(path).startswith("~"):
            raise UserError(f"{what}={text}: that user's home directory is not known; write the whole path")
        if _ADDRESS.match(str(path)) or str(path).startswith("~"):
            path = path.absolute()  # it was ./~name, and is not to be expanded when it is read again
        _refuse_unusable(path.absolute())
    except OSError as error:
        raise UserError(f"{what}={text}: {error.strerror}; take another path") from error
    return path


def _refuse_unusable(path: Path) -> None:
    """Raises OSError where the path could not be made either: a part too long, a loop of links, a file on the way."""
    if len(os.fsencode(path)) > LONGEST:
        raise OSError(0, f"longer than {LONGEST} bytes with the directory it is in")
    if not _is_utf8(str(path)):
        raise OSError(0, "the current directory's name is not UTF-8")
    with contextlib.suppress(FileNotFoundError):
        path.stat()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a file name that are no UTF-8 arrive as lone surrogates
        return False
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object; raises OSError or ValueError."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def write_json(path: Path, content: Any) -> None:
    """Atomic, and valid JSON throughout: null for what is not finite. Raises UserError where it cannot be written."""
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    """What JSON can hold of nested mappings, sequences and numbers."""
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def refuse_unwritable(directory: Path) -> None:
    """Raises UserError where no file can be made in a directory: before the hours of computing what would be in it."""
    if jax.process_index():
        return
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(f"could not write in {directory}: {error.strerror}; --out=FILE writes elsewhere") from error


def write_text(path: Path, text: str) -> None:
    """Atomic; of several processes the first writes. Raises UserError where it cannot."""
    if jax.process_index():
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two programs may write at once
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"could not write {path}: {error.strerror}") from error
