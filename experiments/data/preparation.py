"""Preparation of data sets: base class of builders, source files, progress. No TensorFlow and no network.

tensorflow-datasets writes to a temporary directory and renames it at the end, so the left-overs of an interrupted
preparation (`incomplete...1.0.0` after a kill) are never read as prepared; running it again removes them.
"""

import contextlib
import copy
import fcntl
import importlib
import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track
from tensorflow_datasets.core import shuffle

from experiments.common.errors import UserError
from experiments.common.files import sha256, user_path
from experiments.data.descriptions import INFO, read_description
from experiments.data.sources import OWN_DATASETS

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
# More processes than cores are no faster, and each takes memory.
MOST_PROCESSES = max(32, 4 * (os.cpu_count() or 1))


class ArrayRecordBuilder(tfds.core.GeneratorBasedBuilder):
    """A builder that writes array_record files, named after its module.

    Its features are Tensor, Text and ClassLabel, which need no TensorFlow.

    Args (besides tensorflow-datasets' own, such as data_dir):
      manual_dir: directory of downloaded source files; DATA_DIR/downloads/manual by default.
      processes: number of processes that make examples. The data do not depend on it.
    """

    def __init_subclass__(cls, **kwargs: Any):
        cls.name = cls.__module__.rpartition(".")[2]
        super().__init_subclass__(skip_registration=True, **kwargs)  # stock builders of the same names stay registered

    def __init__(self, *, manual_dir: str | Path | None = None, processes: int = 1, **kwargs: Any):
        if not 1 <= processes <= MOST_PROCESSES:
            raise UserError(f"processes is {processes}; it must be in 1..{MOST_PROCESSES} on this machine")
        self.processes = processes
        try:
            super().__init__(file_format="array_record", **kwargs)
        except Exception as error:  # it reads an existing preparation, which may be anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"the prepared data set {self.name!r} cannot be read: remove it ({reason})") from error
        default = Path(self.data_dir_root) / "downloads" / "manual"
        self.manual_dir = user_path(manual_dir, "--manual_dir") if manual_dir else default

    def is_prepared(self) -> bool:
        """Whether the data set exists. Raises UserError if its description is damaged.

        tensorflow-datasets' own method reads nothing, and logs a warning for a missing data set.
        """
        directory = Path(self.data_dir)
        return (directory / INFO).exists() and bool(read_description(directory).splits)


@dataclass(frozen=True)
class SourceFile:
    """A file that the user downloads: its URL and expected SHA-256 (None: none is published)."""

    name: str
    url: str
    sha256: str | None = None


def find_source(builder: ArrayRecordBuilder, files: Iterable[SourceFile]) -> tuple[SourceFile, Path]:
    """The first of these files found in the builder's manual directory, with its SHA-256 verified.

    Raises UserError if there is none, saying what to download, where to put it and which command to run next, or if
    the file is damaged. Its name and SHA-256 are stored in the metadata of the data set.
    """
    files = list(files)
    for file in files:
        path = builder.manual_dir / file.name
        if path.exists():
            record_source(builder, path, check_sha256(path, file))
            return file, path
    first, names = files[0], " or ".join(file.name for file in files)
    raise UserError(
        f"data set {builder.name!r} is made from {names}, and there is none in {builder.manual_dir}: "
        f"download {first.url} into it, then run: {command(builder)}"
    )


def check_sha256(path: Path, file: SourceFile) -> str | None:
    """The file's SHA-256. Raises UserError if it is not the published one. Directories are not checked."""
    if path.is_dir():
        return None
    found = source_digest(path)
    if file.sha256 not in (None, found):
        raise UserError(
            f"{path} is truncated, damaged or another version: its SHA-256 is {found}, not {file.sha256}; "
            f"download {file.url} again"
        )
    return found


def source_digest(path: Path) -> str:
    """The SHA-256 of a source file. Raises UserError if it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def record_source(builder: ArrayRecordBuilder, path: Path, digest: str | None) -> None:
    """Records the source of the data set in its metadata.json, if it has metadata."""
    if builder.info.metadata is not None:
        builder.info.metadata[f"source {path.name}"] = f"sha256 {digest}" if digest else "directory"


def check_count(path: Path, found: int, expected: int, what: str) -> None:
    """Raises UserError if the source does not have the data set's number of examples."""
    if found != expected:
        raise UserError(
            f"{path} has {found:,} {what} instead of {expected:,}: it is incomplete or another version; "
            "download and unpack it again"
        )


def command(builder: ArrayRecordBuilder) -> str:
    """The command that prepares this data set."""
    name = builder.name + (f"/{builder.builder_config.name}" if builder.builder_config else "")
    root = shlex.quote(str(builder.data_dir_root))
    manual = shlex.quote(str(builder.manual_dir))
    return f"python -m experiments.prepare --dataset={name} --data_dir={root} --manual_dir={manual}"


def builder_class(name: str) -> type[ArrayRecordBuilder]:
    """The builder of `experiments/data/builders/name.py`."""
    return importlib.import_module(f"experiments.data.builders.{name}").Builder


def prepare(builder: tfds.core.GeneratorBasedBuilder) -> Path:
    """Writes the data set unless it exists, and returns its directory. Raises UserError if that fails."""
    tfds.disable_progress_bar()
    original = shuffle._Bucket
    shuffle._Bucket = _Bucket
    try:
        # tensorflow-datasets would print messages about downloading, but nothing is downloaded.
        with _alone(Path(builder.data_dir)), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as error:
        raise UserError(f"cannot write {builder.data_dir}: {error}") from error
    finally:
        shuffle._Bucket = original
    return Path(builder.data_dir)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Locks the directory of a data set, and removes left-overs of preparations that were killed.

    A lock on the parent folder, released by a kill, tells left-overs from a preparation in progress, which raises
    UserError. On a file system without such locks nothing is locked or removed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    place = os.open(directory.parent, os.O_RDONLY)
    try:
        for left in directory.parent.glob(f"incomplete.*_{directory.name}") if _locked(place, directory) else ():
            shutil.rmtree(left)
        yield
    finally:
        os.close(place)


def _locked(place: int, directory: Path) -> bool:
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{directory} is being prepared by another process: wait for it, or stop it") from error
    except OSError:  # this file system has no locks
        return False
    return True


class _Bucket:
    """Replaces tensorflow-datasets' file of shuffled examples (used beyond 1 GB), which needs TensorFlow.

    It opens its file anew for each example, since there are a thousand such files.
    """

    def __init__(self, path: Any):
        self._path = Path(path)
        self._sizes: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, key: int, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(data)
        self._sizes.append((key, len(data)))

    def read_values(self) -> Iterator[tuple[int, bytes]]:
        if self._sizes:
            with self._path.open("rb") as file:
                for key, size in self._sizes:
                    yield key, file.read(size)

    def del_file(self) -> None:
        self._path.unlink(missing_ok=True)


def show_progress(items: Iterable[T], total: int | None, title: str) -> Iterator[T]:
    """Yields the items while showing a progress bar, or occasional lines without a terminal. `total` None: unknown."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, title, total, console=console, transient=True)
        return
    last = time.monotonic()
    whole = "" if total is None else f" of {total:,}"
    for number, item in enumerate(items, 1):
        yield item
        if number == total or time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title}: {number:,}{whole}", file=sys.stderr, flush=True)


def make_builder(dataset: str | None, scale: float = 1.0, **arguments: Any) -> Any:
    """The builder selected by --dataset and --scale; `arguments` are its own. Raises UserError if there is none."""
    name, _, config = (dataset or "").partition("/")
    if name not in OWN_DATASETS:
        given = "no --dataset" if dataset is None else f"unknown data set {dataset!r}"
        raise UserError(f"{given}; --dataset can be: {', '.join(OWN_DATASETS)}")
    builder = builder_class(name)
    configs = [item.name for item in builder.BUILDER_CONFIGS]
    known = ", ".join(f"{name}/{item}" for item in configs) or name
    if config and config not in configs:
        raise UserError(f"unknown data set {dataset!r}; there is {known} (--scale makes a part of one)")
    if not config and len(configs) > 1:
        raise UserError(f"--dataset={name} has several configurations; choose one: {known}")
    return builder(**_part(builder, config or next(iter(configs), ""), scale), **arguments)


def _part(builder: Any, config: str, scale: float) -> dict[str, Any]:
    """The builder's arguments for a configuration or, below scale 1, a configuration with its own name and sizes."""
    if not 0 < scale <= 1:  # NaN too
        raise UserError(f"--scale={scale:g}: must be above 0 and at most 1")
    if scale == 1:
        return {"config": config or None}
    whole = getattr(builder, "SIZES", None)
    if whole is None:
        raise UserError("--scale is for generated data sets; this one is made from files: remove --scale")
    sizes = {split: round(scale * size) for split, size in whole.items()}
    if not all(sizes.values()):
        raise UserError(f"--scale={scale:g} leaves a split without examples: {sizes}")
    configs = {item.name: item for item in builder.BUILDER_CONFIGS}
    part = copy.copy(configs[config]) if configs else tfds.core.BuilderConfig(name="")
    part.name = f"{part.name}_{scale:g}".lstrip("_")
    part.description = f"A part, {scale:g} of every split: {sizes} of {dict(whole)} examples"
    return {"config": part, "sizes": sizes}
