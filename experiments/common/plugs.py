"""Files that a config or a flag names: tasks, models, blocks, mixers, heads, studies. A new one is found by its name;
no list of them exists."""

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path
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


def defining(package: str, export: str) -> list[str]:
    """The files of a package that define this name themselves. None of them is imported, which may take seconds."""
    return [name for name in names(package) if export in _defined(f"{package}.{name}")]


def _defined(module: str) -> set[str]:
    spec = importlib.util.find_spec(module)
    body = ast.parse(Path(str(spec and spec.origin)).read_text()).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    return functions | {ast.unparse(target) for node in body if isinstance(node, ast.Assign) for target in node.targets}


def holds(package: str, name: str, export: str) -> bool:
    """Whether a file of a package has this name in it."""
    return hasattr(importlib.import_module(f"{package}.{name}"), export)
