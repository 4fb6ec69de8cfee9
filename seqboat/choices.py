"""Fields of dataclasses that take one of a few names, as their annotations list them, and those that data decide."""

import dataclasses
import functools
import typing
from typing import Any, Literal


@functools.cache
def choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """What every field of the dataclass that is annotated as a Literal may be."""
    hints = typing.get_type_hints(cls)
    return {field: typing.get_args(hint) for field, hint in hints.items() if typing.get_origin(hint) is Literal}


def check_choices(config: Any) -> None:
    """Raise ValueError for a field that is none of its choices."""
    cls: Any = type(config)
    for field, names in choices(cls).items():
        value = getattr(config, field)
        if value not in names:
            raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(str, names))}")


def given(**field: Any) -> Any:
    """A dataclass's field whose value a task decides, and no config."""
    return dataclasses.field(metadata={"given": True}, **field)


def given_fields(cls: type) -> tuple[str, ...]:
    """The names of the fields that are `given`."""
    return tuple(field.name for field in dataclasses.fields(cls) if field.metadata.get("given"))
