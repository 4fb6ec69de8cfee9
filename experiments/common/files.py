"""Parsing of every path that a user gives, and atomic writes."""

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

# Bytes. The limit on Linux is 4095; the difference leaves room for the files below a directory.
MAX_PATH = 3800
_MOUNTS = {
    "gs": "mount the bucket with gcsfuse, one with a hierarchical namespace to train in, or copy it (docs/launch.md)",
    "s3": "to read, mount the bucket with mount-s3; train on a file system that can rename, and copy (docs/launch.md)",
}
_ADDRESS = re.compile(r"\s*[\w.+@-]+:/")  # one slash: pathlib collapses the two of gs://bucket


def user_path(value: str | os.PathLike, what: str) -> Path:
    """The local path that `value` names, with ~ expanded; it need not exist. Idempotent.

    `what` names it in errors: "--workdir". Raises UserError for a path that cannot be used: a URL (gs://...), the home
    of an unknown user, or a name that is empty, too long, not UTF-8, or below a file.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"{what}={value!r}: expected the path of a file or directory")
    text = os.fspath(value)
    if "\0" in text or not _is_utf8(text):
        raise UserError(f"{what}={text!r}: expected a path in UTF-8 without NUL; rename it, or choose another")
    if _ADDRESS.match(text):
        raise UserError(f"{what}={text}: expected a path on a mounted file system, not a URL; {_instead(text)}")
    try:
        path = Path(os.path.expanduser(text))
        if text.startswith("~") and str(path).startswith("~"):
            raise UserError(f"{what}={text}: that user's home directory is unknown; give the full path")
        if _ADDRESS.match(str(path)) or str(path).startswith("~"):
            path = path.absolute()  # ./~name must not be expanded when it is parsed again
        _refuse_unusable(path.absolute())
    except OSError as error:
        raise UserError(f"{what}={text}: {error.strerror}; choose another path") from error
    return path


def _instead(address: str) -> str:
    """What to do about the address of a bucket, which has neither locks nor atomic renames (docs/launch.md)."""
    kind = address.strip().partition(":")[0].lower()
    return _MOUNTS.get(kind, "mount it")


def _refuse_unusable(path: Path) -> None:
    """Raises OSError if the path can never exist: a component too long, a loop of links, a file among its parents."""
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(0, f"longer than {MAX_PATH} bytes including its directory")
    if not _is_utf8(str(path)):
        raise OSError(0, "the name of the current directory is not UTF-8")
    with contextlib.suppress(FileNotFoundError):
        path.stat()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a file name that are not UTF-8 arrive as lone surrogates
        return False
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises OSError or ValueError."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def write_json(path: Path, content: Any) -> None:
    """Writes valid JSON atomically; values that are not finite become null. Raises UserError if writing fails."""
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def json_line(content: Any) -> str:
    """A line of a JSON Lines file; values that are not finite become null."""
    return json.dumps(_finite(content), allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    """Nested mappings, sequences and numbers as JSON values."""
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def refuse_unwritable(directory: Path) -> None:
    """Raises UserError for a directory that cannot be written to, before hours are spent computing its contents."""
    if jax.process_index():
        return
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"could not write in {directory}: {error.strerror}; choose another path with --out=FILE"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes atomically, from process 0 only. Raises UserError if writing fails."""
    if jax.process_index():
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two programs may write concurrently
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"could not write {path}: {error.strerror}") from error
