"""The seal of a checkpoint: sha256 and size of every file of a step, so that a changed byte is noticed in time."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from experiments.errors import UserError

SEAL = "seal.json"
META = "meta/metadata"


def write(folder: Path, step: int, metrics: dict) -> None:
    """Seals the step in `folder`. Atomic and flushed to the disk."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for item in ("meta", "state")
        for path in sorted((folder / item).rglob("*"))
        if path.is_file()
    }
    partial = folder / f"{SEAL}.partial"
    with partial.open("w") as file:
        json.dump({"step": step, "metrics": metrics, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / SEAL)


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


def problem(folder: Path, step: int) -> str | None:
    """What is wrong with a step, in a few words, or None. Raises UserError for a step that is not ours.

    Nothing in it is trusted: names that lead out of the folder are refused, not followed.
    """
    if not any(folder.iterdir()):
        return "it is empty"
    try:
        if not (folder / SEAL).exists():
            _refuse_foreign(folder)
            return f"{SEAL} is missing"
        seal = read_json(folder / SEAL)
        files = seal.get("files")
        if seal.get("step") != step or not isinstance(files, dict) or META not in files:
            return f"{SEAL} is not the seal of this step"
        problems = (_file_problem(folder, name, entry) for name, entry in files.items())
        return next((problem for problem in problems if problem), None)
    except (OSError, ValueError, RuntimeError) as error:
        return f"it cannot be verified: {error}"


def _file_problem(folder: Path, name: str, entry: Any) -> str | None:
    """What is wrong with one file of a seal."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return f"{SEAL} names {name!r}, outside of the checkpoint"
    if not isinstance(entry, dict):
        return f"{SEAL} is malformed at {name}"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry.get("size"):
        return f"{name} has {path.stat().st_size} bytes instead of {entry.get('size')}"
    return None if sha256(path) == entry.get("sha256") else f"{name} has changed"


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError unless the unsealed step is ours by its meta dictionary."""
    try:
        ours = read_json(folder / META).get("format") == "seqboat"
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{folder} was not written by seqboat: choose another directory for the checkpoints")
