"""Which data a checkpoint was trained on: the fingerprint in its meta, and what has changed since."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.common.files import user_path

_DIGITS = 12  # hex digits of a digest that are shown


def remember(task: Any) -> dict[str, Any]:
    """The value of meta["data"]: the task's fingerprint, and the directory that relative paths refer to."""
    found: dict[str, Any] = {"fingerprint": task.fingerprint}
    with suppress(OSError):  # the directory was removed meanwhile
        if task.fingerprint:
            found["directory"] = os.getcwd()
    return found


def changes(remembered: Any, task: Any) -> list[str]:
    """Differences of the task's data from a checkpoint's meta["data"], as `name: old -> new`; empty without it."""
    old = remembered.get("fingerprint") if isinstance(remembered, Mapping) else None
    if not isinstance(old, Mapping):  # written before fingerprints existed
        return []
    new = task.fingerprint
    names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    return [_printable(f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}") for name in names]


def relocated(values: dict[str, Any], remembered: Any, data_dir: str | None) -> dict[str, Any]:
    """A checkpoint's config with the current locations of `data_dir`, `task.files` and `task.run`.

    A given `data_dir` holds them, under their base names. Without it, relative paths are resolved in the directory they
    were given in.
    """
    named_from = remembered.get("directory") if isinstance(remembered, Mapping) else None
    there = Path(named_from) if isinstance(named_from, str) else None
    here = None if data_dir is None else user_path(data_dir, "--data_dir")
    if place := data_dir or _place(values.get("data_dir"), "config.data_dir", there, None):
        values = {**values, "data_dir": place}
    task = values.get("task")
    if not isinstance(task, Mapping):
        return values
    task = dict(task)
    if isinstance(task.get("files"), list | tuple):
        task["files"] = [_place(name, "config.task.files", there, here) for name in task["files"]]
    if "run" in task:
        task["run"] = _place(task["run"], "config.task.run", there, here)
    return {**values, "task": task}


def _place(name: Any, what: str, there: Path | None, here: Path | None) -> Any:
    if not isinstance(name, str) or not name:
        return name  # the config parser reports what is wrong
    path, places = user_path(name, what), []
    if here is not None:
        places = [here / part for part in (path, path.name) if not Path(part).is_absolute()]
    elif there is not None and not path.is_absolute():
        places = [there / path]
    return next((str(place) for place in places if place.exists()), name)


def _short(value: Any) -> str:
    words = "none" if value is None else str(value)
    return " ".join(word[:_DIGITS] if len(word) == 64 else word for word in words.split())


def _printable(text: str) -> str:
    """A short printable form: checkpoints are untrusted, and this is shown on a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
