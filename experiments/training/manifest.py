"""The seal of a checkpoint: sha256 and size of every file of a step, so that any changed byte is detected."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError
from experiments.common.files import read_json, sha256
from seqboat.version import metric_today

SEAL = "seal.json"
META = "meta/metadata"


def write(folder: Path, step: int, metrics: dict) -> None:
    """Seals the step in `folder`, atomically and flushed to disk."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for item in ("meta", "state")
        for path in sorted((folder / item).rglob("*"))
        if path.is_file()
    }
    partial = folder / f"{SEAL}.partial"
    with partial.open("w") as file:
        seal = {"step": step, "metrics": metrics, "files": files}
        json.dump({**seal, "sha256": _digest(seal)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / SEAL)


def metrics(folder: Path, step: int) -> Any:
    """The metrics of a step as sealed. Raises OSError or ValueError for a missing or damaged seal."""
    if not (folder / SEAL).is_file():
        raise ValueError(f"{SEAL} is missing")
    seal = read_json(folder / SEAL)
    if not _is_of(seal, step) or not _is_whole(seal):
        raise ValueError(f"{SEAL} has changed")
    return {metric_today(name): value for name, value in (seal.get("metrics") or {}).items()}


def problem(folder: Path, step: int, *, arrays: bool = True) -> str | None:
    """The defect of a step in a few words, or None. Raises UserError for a step not written by seqboat.

    Nothing in it is trusted: names that lead outside the folder are rejected, not followed. Without `arrays` only the
    seal and the meta dictionary are verified.
    """
    if not any(folder.iterdir()):
        return "it is empty"
    try:
        if not (folder / SEAL).exists():
            _refuse_foreign(folder)
            return f"{SEAL} is missing"
        seal = read_json(folder / SEAL)
        if not _is_of(seal, step):
            return f"{SEAL} is not the seal of this step"
        files = seal["files"].items() if arrays else [(META, seal["files"][META])]
        problems = (_file_problem(folder, name, entry) for name, entry in files)
        return next((problem for problem in problems if problem), None if _is_whole(seal) else f"{SEAL} has changed")
    except (OSError, ValueError, RuntimeError) as error:
        return f"it cannot be verified: {error}"


def _is_of(seal: dict, step: int) -> bool:
    files = seal.get("files")
    return seal.get("step") == step and isinstance(files, dict) and META in files


def _is_whole(seal: dict) -> bool:
    """Whether the seal's own digest is right; earlier seals have none."""
    return "sha256" not in seal or seal["sha256"] == _digest(seal)


def _digest(seal: dict) -> str:
    """A digest of everything that decisions depend on: step, metrics, file names. Entries of files are checked against
    the files."""
    decided = [seal["step"], seal.get("metrics"), sorted(seal["files"])]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def _file_problem(folder: Path, name: str, entry: Any) -> str | None:
    """The defect of one sealed file, or None."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return f"{SEAL} names {name!r}, outside the checkpoint"
    if not isinstance(entry, dict):
        return f"{SEAL} is malformed at {name}"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry.get("size"):
        return f"{name} has {path.stat().st_size} bytes instead of {entry.get('size')}"
    return None if sha256(path) == entry.get("sha256") else f"{name} has changed"


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError unless the meta dictionary shows that the unsealed step was written by seqboat."""
    try:
        ours = read_json(folder / META).get("format") == "seqboat"
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{folder} was not written by seqboat: choose another directory for the checkpoints")
