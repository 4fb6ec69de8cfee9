"""Prepared tensorflow-datasets data as random-access sources. Downloads nothing and does not need TensorFlow.

Everything is checked on disk before tensorflow-datasets is called, whose own look-up of a missing data set tries the
network for minutes (measured: 206 s).
"""

import functools
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.data.descriptions import Description, again, read_description

# The data sets of `python -m experiments.prepare`, one file each.
OWN_DATASETS = tuple(sorted(p.stem for p in (Path(__file__).parent / "builders").glob("[!_]*.py")))

# What a loader makes of a source's examples. Not defined in `loader`, which takes seconds to import.
Batch = dict[str, np.ndarray]

_SAMPLES = 16  # examples of a split that are hashed into its fingerprint


class Source(Protocol):
    """Examples by index, safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Subset:
    """The examples of a source at the given indices, in that order."""

    def __init__(self, source: Source, indices: Sequence[int] | Int[np.ndarray, " N"]):
        self._source = source
        self._indices = indices

    @property
    def fingerprint(self) -> dict[str, str]:
        """The fingerprint of the whole source; the config determines which part of it this is."""
        return getattr(self._source, "fingerprint", {})

    @property
    def name(self) -> str | None:
        return getattr(self._source, "name", None)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._source[int(self._indices[index])]


class Generated:
    """`size` examples generated when read: example i is `make(generator)` with a random stream of (seed, split, i)."""

    def __init__(self, make: Callable[[np.random.Generator], Any], seed: int, split: int, size: int):
        self._make = make
        self._key = (seed, split)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        return self._make(np.random.default_rng((*self._key, index)))


class PreparedSplit:
    """One split of a prepared data set. Raises UserError naming split and directory for an unreadable example."""

    def __init__(self, examples: Source, directory: Path, split: str, name: str, description: Description):
        self._examples = examples
        self._directory = directory
        self._split = split
        self.name = name
        self._description = description

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._examples[index]
        except RuntimeError as error:  # array_record's error for damaged bytes
            where = f"example {index} of split {self._split!r} in {self._directory}"
            raise UserError(f"{where} is damaged; {again(self._directory)} ({error})") from error

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """The split's fingerprint: its description, and a hash of a few examples to detect other contents of equal
        size."""
        split, features = self._description.splits[self._split], self._description.features
        digest = hashlib.sha256(json.dumps([features, split.lengths, split.size], sort_keys=True).encode())
        # Pictures and sound are left out: their decoded values depend on library versions.
        exact = sorted(name for name, feature in features.items() if feature.keys() & {"tensor", "text", "classLabel"})
        for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLES).astype(int)):
            example = self[int(index)]
            for value in (np.asarray(example[name]) for name in exact):
                digest.update(repr(value.tolist()).encode())
        where = f"{self.name} {self._directory.name} {self._split}"
        return {where: f"{len(self):,} examples, sha256 {digest.hexdigest()}"}


def data_directory(data_dir: str | None) -> Path:
    """The directory of prepared data sets: the argument, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    if data_dir:
        return user_path(data_dir, "data_dir")
    return user_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "TFDS_DATA_DIR")


def open_split(name: str, split: str, data_dir: str | None, features: Sequence[str] = ()) -> PreparedSplit:
    """The split of a prepared data set, `name` or `name/config`, in the newest version in the data directory.

    Raises UserError, within a second, if the data set is missing, is not array_record, lacks the split, its examples or
    these `features`, or if files of the split are missing or damaged.
    """
    directory = _version_directory(name, data_directory(data_dir))
    description = read_description(directory)
    if missing := [feature for feature in features if feature not in description.features]:
        found = ", ".join(description.features)
        raise UserError(
            f"data set {name!r} has no {' and no '.join(map(repr, missing))} but {found}: it is not one for this task "
            f"({directory})"
        )
    _check_files(directory, split, description)
    import tensorflow_datasets as tfds  # imported late: it takes seconds

    try:
        examples = tfds.builder_from_directory(directory).as_data_source(split=split)
    except Exception as error:  # damaged metadata may raise anything
        message = (str(error).splitlines() or [""])[0]
        raise UserError(f"{directory} cannot be read; {again(directory)} ({message})") from error
    return PreparedSplit(examples, directory, split, name, description)


def _version_directory(name: str, root: Path) -> Path:
    """root/name/1.0.0 with the highest version. Left-overs of an interrupted preparation have other names."""
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", name, re.ASCII) or ".." in name.split("/"):
        raise UserError(
            f"data set {name!r}: expected a name, or name/config, of letters, digits, '_', '.', '+' and '-'"
        )
    versions = [path.parent for path in (root / name).glob("*/dataset_info.json")]
    versions = [path for path in versions if re.fullmatch(r"\d{1,9}\.\d{1,9}\.\d{1,9}", path.name, re.ASCII)]
    if versions:
        return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))
    if name.partition("/")[0] in OWN_DATASETS:
        # --data_dir is equivalent to the variable, so the command is right whichever way the directory was given.
        part = re.fullmatch(r"(.*)[_/](0\.\d+|\d(?:\.\d+)?e-\d+)", name)  # of a generated data set
        what = f"{part[1]} --scale={part[2]}" if part else name
        remedy = f"run: python -m experiments.prepare --dataset={what} --data_dir={shlex.quote(str(root))}"
    else:
        remedy = (
            "prepare it on a machine that has TensorFlow, "
            f'tfds.builder("{name}", file_format="array_record").download_and_prepare(), and copy it to {root / name}'
        )
    raise UserError(f"data set {name!r} is not in {root} (--config.data_dir or TFDS_DATA_DIR names another): {remedy}")


def _check_files(directory: Path, split: str, description: Description) -> None:
    """Checks that every file of the split exists, is complete array_record, and has the declared number of examples."""
    if split not in description.splits:
        raise UserError(f"{directory} has no split {split!r}; it has: {', '.join(description.splits)}")
    found = description.splits[split]
    if not sum(found.lengths):
        raise UserError(f"{directory}: the {split} split has no examples; {again(directory)}")
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for file, expected in zip(found.files, found.lengths, strict=True):
        path = directory / file
        if not os.path.isfile(path):  # also False for an impossible file name
            raise UserError(f"{path} is missing; {again(directory)}")
        try:
            count = len(ArrayRecordDataSource([str(path)]))
        except RuntimeError as error:
            raise UserError(f"{path} is damaged or truncated; {again(directory)} ({error})") from error
        if count != expected:
            raise UserError(f"{path} holds {count} examples instead of {expected}; {again(directory)}")
