"""Which data a checkpoint was trained on: what is remembered in its meta, and what has changed since."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.files import user_path

_DIGITS = 12  # of a digest are shown


def remember(task: Any) -> dict[str, Any]:
    """For meta["data"]: the task's fingerprint, and the directory that files were named from."""
    found: dict[str, Any] = {"fingerprint": task.fingerprint}
    with suppress(OSError):  # it was removed meanwhile
        if getattr(task.config, "files", ()):
            found["directory"] = os.getcwd()
    return found


def changes(remembered: Any, task: Any) -> list[str]:
    """What of a checkpoint's meta["data"] the task's data is not, as `name: old -> new`; nothing where it has none."""
    old = remembered.get("fingerprint") if isinstance(remembered, Mapping) else None
    if not isinstance(old, Mapping):  # of before fingerprints were kept
        return []
    new = task.fingerprint
    names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    return [_printable(f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}") for name in names]


def relocated(values: dict[str, Any], remembered: Any, data_dir: str | None) -> dict[str, Any]:
    """A checkpoint's config with `task.files` where they lie now.

    A file is looked for by its name in `data_dir`, where that is given; else, if it was named relatively, in the
    directory that it was named from.
    """
    task = values.get("task")
    if not isinstance(task, Mapping) or not isinstance(task.get("files"), list | tuple):
        return values
    named_from = remembered.get("directory") if isinstance(remembered, Mapping) else None
    files = [_place(name, named_from, data_dir) for name in task["files"]]
    return {**values, "task": {**task, "files": files}}


def _place(name: Any, named_from: Any, data_dir: str | None) -> Any:
    if not isinstance(name, str) or not name:
        return name  # the config's reader says what is wrong
    path, places = user_path(name, "config.task.files"), []
    if data_dir is not None:
        here = user_path(data_dir, "--data_dir")
        places = [here / part for part in (path, path.name) if not Path(part).is_absolute()]
    elif isinstance(named_from, str) and not path.is_absolute():
        places = [Path(named_from) / path]
    return next((str(place) for place in places if place.is_file()), name)


def _short(value: Any) -> str:
    words = "none" if value is None else str(value)
    return " ".join(word[:_DIGITS] if len(word) == 64 else word for word in words.split())


def _printable(text: str) -> str:
    """What is read from a checkpoint may be anybody's, and is shown on a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
