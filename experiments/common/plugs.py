"""Files that a config names: tasks, models, blocks, mixers. A new one is found by its name; no list of them exists."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from experiments.common.errors import UserError


def find(package: str, name: Any, where: str, *exports: str) -> ModuleType:
    """The module `package.name`. Raises UserError, beginning with `where`, if there is no such file, or if it lacks one
    of the names that it must export."""
    path = f"{package.replace('.', '/')}/{name}.py"
    if not isinstance(name, str) or name not in names(package):
        raise UserError(f"{where}={name!r}: there is no file {path}; there are {', '.join(names(package))}")
    module = importlib.import_module(f"{package}.{name}")
    for export in exports:
        if not hasattr(module, export):
            raise UserError(f"{where}={name!r}: {path} holds no {export}")
    return module


def names(package: str) -> list[str]:
    """The files of a package, but those whose names begin with an underscore."""
    places = importlib.import_module(package).__path__
    return sorted(info.name for info in pkgutil.iter_modules(places) if not info.name.startswith("_"))


def holds(package: str, name: str, export: str) -> bool:
    """Whether a file of a package has this name in it."""
    return hasattr(importlib.import_module(f"{package}.{name}"), export)
