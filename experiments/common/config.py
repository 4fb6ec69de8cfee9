"""From a config's values to frozen dataclasses, with an error that names the field."""

import ast
import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from experiments.common.errors import UserError
from experiments.common.terminal import printable

if TYPE_CHECKING:  # a program that reads no config runs without ml_collections
    from ml_collections import ConfigDict

T = TypeVar("T")

# Numbers become 32-bit constants of compiled programs. A field of which that is not so says by `at_most` what it takes.
LARGEST, LARGEST_FLOAT = 2**31 - 1, float(np.finfo(np.float32).max)


def at_most(largest: int, **field: Any) -> Any:
    """A dataclass's field for a whole number of up to `largest` instead of LARGEST."""
    return dataclasses.field(metadata={"at_most": largest}, **field)


def to_dataclass(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of a frozen dataclass from a mapping; nested dataclasses from nested mappings.

    Raises UserError for an unknown or missing field, a value of another type, a number that is not finite or too
    large, or what the dataclass refuses.
    """
    types_of = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UserError(f"{where}.{name}: unknown field{_suggestion(name, fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _value(types_of[name], values[name], f"{where}.{name}")
            _check_leaves(arguments[name], f"{where}.{name}", field, type(None) in typing.get_args(types_of[name]))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name}: missing")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}.{error}") from error


def with_fields(config: T, words: Iterable[str], where: str) -> T:
    """A frozen dataclass with the fields of words "field=value" replaced; a value is a Python literal, or text.

    Raises UserError as `to_dataclass` does, and for a word of another form.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{where}={word}: expected field=value, separated by commas")
        values[name] = _literal(text)
    return to_dataclass(type(config), values, where)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def defaults(*classes: type, but: Collection[str] = (), **given: Any) -> "ConfigDict":
    """The fields of dataclasses with their defaults, as a config: `given` for those that have none, or another here.

    A field that may be None keeps its type while it is None. Fields in `but`, of nested dataclasses too, are left out.
    """
    from ml_collections import ConfigDict

    config = ConfigDict()
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name in but:
                continue
            value = given.pop(field.name) if field.name in given else _default(field)
            if dataclasses.is_dataclass(value):
                config[field.name] = defaults(type(value), but=but)
            else:
                _set(config, field.name, hints[field.name], value)
    if given:
        raise TypeError(f"{', '.join(given)}: no such fields of {', '.join(cls.__name__ for cls in classes)}")
    return config


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is dataclasses.MISSING:
        raise TypeError(f"{field.name} has no default")
    return field.default


def _set(config: "ConfigDict", name: str, hint: Any, value: Any) -> None:
    from ml_collections.config_dict import placeholder

    kinds = [option for option in typing.get_args(hint) if option is not type(None)]
    if any(map(dataclasses.is_dataclass, kinds)):  # a name, or a group
        config[name] = placeholder(object)
    elif type(None) in typing.get_args(hint) and len(kinds) == 1:
        config[name] = placeholder(_plain_type(kinds[0]))
    config[name] = value


def _plain_type(kind: Any) -> type:
    """What values of an annotation are instances of."""
    origin = typing.get_origin(kind)
    return type(typing.get_args(kind)[0]) if origin is typing.Literal else origin or kind


def split_fields(values: Mapping[str, Any], *classes: type, where: str) -> list[dict[str, Any]]:
    """A flat mapping distributed over several dataclasses by their fields' names."""
    names = [{field.name for field in dataclasses.fields(cls)} for cls in classes]
    known = set().union(*names)
    for name in values:
        if name not in known:
            raise UserError(f"{where}.{name}: unknown field{_suggestion(name, known)}")
    return [{name: value for name, value in values.items() if name in group} for group in names]


def _suggestion(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known))}"


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [argument for argument in arguments if argument is not type(None)]
        if len(options) == 1:
            return _value(options[0], value, where)
        if any(isinstance(value, typing.get_origin(option) or option) for option in options):
            return tuple(value) if isinstance(value, list | tuple) else value
        raise UserError(f"{where}={value!r}: expected {kind}")
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where}={value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}={value!r}: expected a tuple")
        kinds = itertools.repeat(arguments[0], len(value)) if ... in arguments else arguments
        if len(value) != len(kinds := tuple(kinds)):
            raise UserError(f"{where}={value!r}: expected {len(kinds)} items")
        return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r}: expected a group of fields")
        return to_dataclass(kind, value, where)  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else math.inf  # refused as such
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}={value!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _check_leaves(value: Any, where: str, field: dataclasses.Field, optional: bool) -> None:
    """Raises UserError for what no compiled program, JSON file or file name can hold, in nested tuples too."""
    if isinstance(value, tuple):
        for item in value:
            _check_leaves(item, where, field, optional)
    elif isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:  # NaN too
        otherwise = ", or None for no limit" if optional else ""
        raise UserError(f"{where}={value}: must be a finite number of 32 bits{otherwise}")
    elif isinstance(value, int) and abs(value) > (largest := field.metadata.get("at_most", LARGEST)):
        shown = value if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"
        raise UserError(f"{where}={shown}: must be {f'at most {largest}' if value > 0 else f'at least {-largest}'}")
    elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}={value!r}: must be text in UTF-8 without NUL")


def _as_read_back(value: Any) -> Any:
    """A value as JSON gives it back: sequences are lists."""
    return [_as_read_back(item) for item in value] if isinstance(value, list | tuple) else value


def differences(old: Any, new: Any, where: str = "config") -> list[str]:
    """The leaves in which two nested mappings of values differ, as `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        places = {name: f"{where}.{printable(name, but='')}" for name in sorted({*old, *new})}
        return [line for name in places for line in differences(old.get(name), new.get(name), places[name])]
    return [] if _as_read_back(old) == _as_read_back(new) else [f"{where}: {old!r} -> {new!r}"]


def within(config: Any, low: int, high: int, *fields: str) -> None:
    """Raises ValueError for a field of a config outside low..high."""
    for field in fields:
        value = getattr(config, field)
        if value < low:
            raise ValueError(f"{field}={value}: must be at least {low}")
        if value > high:
            raise ValueError(f"{field}={value}: must be at most {high}")
