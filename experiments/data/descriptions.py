"""Parsing and validation of a prepared data set's dataset_info.json and features.json.

The files may be truncated, edited by hand, or untrusted. Every error is one line that names the file and the field.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from experiments.common.errors import UserError
from experiments.common.files import read_json

INFO, FEATURES = "dataset_info.json", "features.json"
MOST_BYTES = 2**26
_CLASSES = "tensorflow_datasets."
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # the default of tensorflow-datasets


@dataclasses.dataclass(frozen=True)
class SplitDescription:
    """The names of a split's files, the number of examples in each, and the bytes of all examples (None: not given)."""

    files: tuple[str, ...]
    lengths: tuple[int, ...]
    size: int | None


@dataclasses.dataclass(frozen=True)
class Description:
    """The declared contents of a directory. `features` maps names to feature descriptions."""

    splits: Mapping[str, SplitDescription]
    features: Mapping[str, Mapping[str, Any]]


def read_description(directory: Path) -> Description:
    """Raises UserError naming the file and the field that is missing, malformed or of the wrong type."""
    info, features = (_read(directory, name) for name in (INFO, FEATURES))
    file_format = info.get("fileFormat", "tfrecord")  # absent in files of old tensorflow-datasets versions
    if file_format != "array_record":
        raise UserError(
            f"{directory} holds {str(file_format)[:40]} files, which cannot be read by index; prepare it again on a "
            'machine that has TensorFlow, with tfds.builder(..., file_format="array_record")'
        )
    try:
        return Description(_splits(info), _features(features))
    except _Broken as error:
        raise UserError(f"{directory / error.file}: {error}; {again(directory)}") from error


def again(directory: Path) -> str:
    """The remedy for a damaged data set."""
    return f"copy it again, or remove {directory} and prepare the data set again"


class _Broken(Exception):
    def __init__(self, file: str, field: str, value: Any, expected: str):
        found = json.dumps(value) if value is not None else "missing or null"
        super().__init__(f"{field} is {found[:60]}, expected {expected}")
        self.file = file


def _read(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES:,} bytes")
        return read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {again(directory)}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}; {again(directory)} ({error})") from error


def _splits(info: dict[str, Any]) -> dict[str, SplitDescription]:
    dataset, splits = _word(INFO, "name", info.get("name")), info.get("splits")
    _word(INFO, "version", info.get("version"))
    if not isinstance(splits, list) or not splits:
        raise _Broken(INFO, "splits", splits, "a list of splits")
    found: dict[str, SplitDescription] = {}
    for number, split in enumerate(splits):
        where = f"splits[{number}]"
        if not isinstance(split, dict):
            raise _Broken(INFO, where, split, "an object")
        name = _word(INFO, f"{where}.name", split.get("name"))
        if name in found:
            raise _Broken(INFO, f"{where}.name", name, "a unique name")
        found[name] = _split(dataset, name, split, where)
    return found


def _split(dataset: str, name: str, split: dict[str, Any], where: str) -> SplitDescription:
    lengths = split.get("shardLengths", [])
    if not isinstance(lengths, list):
        raise _Broken(INFO, f"{where}.shardLengths", lengths, "a list of numbers")
    counts = tuple(_count(f"{where}.shardLengths[{n}]", length) for n, length in enumerate(lengths))
    size = _count(f"{where}.numBytes", split["numBytes"]) if "numBytes" in split else None
    template = split.get("filepathTemplate", TEMPLATE) or TEMPLATE
    files = tuple(_file(template, dataset, name, number, len(counts), where) for number in range(len(counts)))
    return SplitDescription(files, counts, size)


def _file(template: Any, dataset: str, split: str, number: int, of: int, where: str) -> str:
    index, count = f"{number:05d}", f"{of:05d}"
    names = {"DATASET": dataset, "SPLIT": split, "FILEFORMAT": "array_record", "SHARD_INDEX": index}
    names |= {"NUM_SHARDS": count, "SHARD_X_OF_Y": f"{index}-of-{count}"}
    try:
        if any(
            field not in (None, *names) or spec or convert for _, field, spec, convert in Formatter().parse(template)
        ):
            raise ValueError
        file = template.format(**names)
    except (ValueError, TypeError) as error:
        raise _Broken(INFO, f"{where}.filepathTemplate", template, f"a string like {TEMPLATE}") from error
    if "\0" in file or Path(file).is_absolute() or ".." in Path(file).parts:
        raise _Broken(INFO, f"{where}.filepathTemplate", template, "a file in this directory")
    return file


def _features(features: dict[str, Any]) -> dict[str, dict[str, Any]]:
    group = features.get("featuresDict")
    found = group.get("features") if isinstance(group, dict) else None
    if not isinstance(found, dict) or not found:
        raise _Broken(FEATURES, "featuresDict.features", found, "an object of features")
    for name, feature in found.items():
        if not isinstance(feature, dict):
            raise _Broken(FEATURES, f"featuresDict.features.{name}", feature, "an object")
    _refuse_other_classes(features)
    return found


def _refuse_other_classes(features: dict[str, Any]) -> None:
    """tensorflow-datasets imports the module of every named class, so only its own are allowed."""
    rest: list[Any] = [features]
    while rest:
        item = rest.pop()
        rest += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        name = item.get("pythonClassName", _CLASSES) if isinstance(item, dict) else _CLASSES
        if not isinstance(name, str) or not name.startswith(_CLASSES):
            raise _Broken(FEATURES, "pythonClassName", name, f"a class of {_CLASSES}*")


def _word(file: str, field: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.+-]{1,200}", value, re.ASCII):
        raise _Broken(file, field, value, "a name of letters, digits, '_', '.', '+' and '-'")
    return value


def _count(field: str, value: Any) -> int:
    """A number of examples or bytes; protobuf writes 64-bit integers as strings."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise _Broken(INFO, field, value, "a whole number")
    return int(text)
