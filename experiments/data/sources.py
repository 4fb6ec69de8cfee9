"""Prepared tensorflow-datasets data as random-access sources. Nothing here downloads, and TensorFlow is not needed.

Everything is checked on disk before tensorflow-datasets is called: its own look-up of a missing data set tries the
network for minutes (measured: 206 s).
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from experiments.errors import UserError

# What `python -m experiments.prepare` makes: one file each.
OWN_DATASETS = tuple(sorted(p.stem for p in (Path(__file__).parent / "builders").glob("[!_]*.py")))


class Source(Protocol):
    """Examples by index: safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Subset:
    """The examples of a source at these indices, in this order."""

    def __init__(self, source: Source, indices: Sequence[int] | Int[np.ndarray, " N"]):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._source[int(self._indices[index])]


class Generated:
    """`size` examples, each made when it is read: example i is `make(generator)` with a stream of (seed, split, i)."""

    def __init__(self, make: Callable[[np.random.Generator], Any], seed: int, split: int, size: int):
        self._make = make
        self._key = (seed, split)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        return self._make(np.random.default_rng((*self._key, index)))


class PreparedSplit:
    """One split of a prepared data set. An example that cannot be read raises UserError naming split and directory."""

    def __init__(self, examples: Source, directory: Path, split: str):
        self._examples = examples
        self._directory = directory
        self._split = split

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._examples[index]
        except RuntimeError as error:  # array_record's error for damaged bytes
            where = f"example {index} of split {self._split!r} in {self._directory}"
            raise UserError(f"{where} is damaged; {_again(self._directory)} ({error})") from error


def data_directory(data_dir: str | None) -> Path:
    """Where prepared data sets are: the argument, else the variable TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_split(name: str, split: str, data_dir: str | None) -> PreparedSplit:
    """The split of a prepared data set, `name` or `name/config`, in the newest version that lies in the data directory.

    Raises UserError, within a second, if it is not there, not array_record or has no such split, or if files of the
    split are missing or damaged.
    """
    directory = _version_directory(name, data_directory(data_dir))
    _check_files(directory, split, _read_info(directory))
    import tensorflow_datasets as tfds  # here, not above: it takes seconds

    try:
        examples = tfds.builder_from_directory(directory).as_data_source(split=split)
    except Exception as error:  # whatever damaged metadata make it raise
        message = (str(error).splitlines() or [""])[0]
        raise UserError(f"{directory} cannot be read; {_again(directory)} ({message})") from error
    return PreparedSplit(examples, directory, split)


def _version_directory(name: str, root: Path) -> Path:
    """root/name/1.0.0 with the highest version. What an interrupted preparation leaves has another name."""
    versions = [path.parent for path in (root / name).glob("*/dataset_info.json")]
    versions = [path for path in versions if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    if versions:
        return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))
    if name.partition("/")[0] in OWN_DATASETS:
        # The variable serves as well as the flag, so the command is exact whichever way the directory was given.
        part = re.fullmatch(r"(.*)[_/](0\.\d+)", name)  # of a generated data set
        what = f"{part[1]} --scale={part[2]}" if part else name
        remedy = f"run: python -m experiments.prepare --dataset={what} --data_dir={shlex.quote(str(root))}"
    else:
        remedy = (
            "prepare it on a machine that has TensorFlow, "
            f'tfds.builder("{name}", file_format="array_record").download_and_prepare(), and copy it to {root / name}'
        )
    raise UserError(f"data set {name!r} is not in {root} (--config.data_dir or TFDS_DATA_DIR names another): {remedy}")


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / "dataset_info.json"
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}; {_again(directory)} ({error})") from error
    if not isinstance(info, dict) or "name" not in info:
        raise UserError(f"{path} is damaged; {_again(directory)}")
    if not (directory / "features.json").is_file():
        raise UserError(f"{directory / 'features.json'} is missing; {_again(directory)}")
    file_format = info.get("fileFormat", "tfrecord")  # absent in what old versions of tensorflow-datasets wrote
    if file_format != "array_record":
        raise UserError(
            f"{directory} holds {file_format} files, which cannot be read by index; prepare it again on a machine that "
            'has TensorFlow, with tfds.builder(..., file_format="array_record")'
        )
    return info


def _check_files(directory: Path, split: str, info: dict[str, Any]) -> None:
    """Every file of the split is there, is array_record to its last byte, and has as many examples as it should."""
    splits = {item["name"]: item for item in info.get("splits", [])}
    if split not in splits:
        raise UserError(f"{directory} has no split {split!r}; it has: {', '.join(splits)}")
    template = splits[split].get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    lengths = [int(length) for length in splits[split].get("shardLengths", [])]
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for number, expected in enumerate(lengths):
        shard = f"{number:05d}-of-{len(lengths):05d}"
        names = {"DATASET": info["name"], "SPLIT": split, "FILEFORMAT": "array_record", "SHARD_X_OF_Y": shard}
        path = directory / template.format(**names)
        if not path.is_file():
            raise UserError(f"{path} is missing; {_again(directory)}")
        try:
            found = len(ArrayRecordDataSource([str(path)]))
        except RuntimeError as error:
            raise UserError(f"{path} is damaged or cut short; {_again(directory)} ({error})") from error
        if found != expected:
            raise UserError(f"{path} holds {found} examples instead of {expected}; {_again(directory)}")


def _again(directory: Path) -> str:
    return f"copy it again, or remove {directory} and prepare the data set again"
