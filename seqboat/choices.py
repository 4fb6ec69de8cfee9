"""Fields of dataclasses that take one of a few names, as their annotations list them: the one place of each list."""

import functools
import typing
from typing import Any, Literal


@functools.cache
def choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """What every field of the dataclass that is annotated as a Literal, or as one or None, may be."""
    return {field: names for field, hint in typing.get_type_hints(cls).items() if (names := _names(hint))}


def check_choices(config: Any) -> None:
    """Raise ValueError for a field that is none of its choices."""
    cls: Any = type(config)
    for field, names in choices(cls).items():
        value = getattr(config, field)
        if value not in names:
            raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(str, names))}")


def _names(hint: Any) -> tuple[Any, ...]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return arguments
    own = [_names(option) for option in arguments if typing.get_origin(option) is Literal]
    return (*own[0], None) if len(own) == 1 and type(None) in arguments and len(arguments) == 2 else ()
