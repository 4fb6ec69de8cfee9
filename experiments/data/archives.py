"""Files inside a directory, a tar or a zip, read in place: nothing is ever unpacked to disk."""

import contextlib
import gzip
import io
import lzma
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np
from jaxtyping import Int16

from experiments.errors import UserError

# What the standard library raises for an archive that is cut short or changed.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def read_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and contents of the files of a directory, a tar or a zip whose name is wanted.

    Names are relative, with slashes and no leading "./". They come in sorted order from a directory, and in the
    archive's own order otherwise. Raises UserError naming the archive if it is damaged.
    """
    with _damage_named(path):
        if path.is_dir():
            names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            yield from ((name, (path / name).read_bytes()) for name in names if wanted(name))
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and wanted(_plain(info.filename)):
                        yield _plain(info.filename), archive.read(info)
        else:
            with tarfile.open(path) as tar:
                for member in _tar_files(tar):
                    if wanted(_plain(member.name)):
                        yield _plain(member.name), _open_member(tar, member).read()


@contextlib.contextmanager
def open_file(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The one file with this base name: in a directory, tar or zip, or `path` itself, which may be gzipped.

    Raises UserError if there is none, and if the archive turns out to be damaged while the file is read.
    """
    with _damage_named(path), contextlib.ExitStack() as stack:
        yield _find(path, name, stack)


def _find(path: Path, name: str, stack: contextlib.ExitStack) -> IO[bytes]:
    if path.is_dir():
        if (path / name).is_file():
            return stack.enter_context((path / name).open("rb"))
    elif path.name == name:
        return stack.enter_context(path.open("rb"))
    elif path.name == f"{name}.gz":
        return cast(IO[bytes], stack.enter_context(gzip.open(path)))
    elif path.suffix == ".zip":
        archive = stack.enter_context(zipfile.ZipFile(path))
        for info in archive.infolist():
            if not info.is_dir() and PurePosixPath(info.filename).name == name:
                return stack.enter_context(archive.open(info))
    else:
        tar = stack.enter_context(tarfile.open(path))  # noqa: SIM115
        for member in _tar_files(tar):
            if PurePosixPath(member.name).name == name:
                return _open_member(tar, member)
    raise UserError(f"{path} has no file {name}: it is incomplete or another one")


def read_wav(where: str, contents: bytes, rate: int) -> Int16[np.ndarray, " L"]:
    """The samples of a 16-bit mono WAV file of this rate in Hz. Raises UserError naming `where` for anything else."""
    try:
        with wave.open(io.BytesIO(contents)) as file:
            found = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            frames = file.getnframes()
            samples = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        raise UserError(f"{where} is damaged or no WAV file ({str(error) or 'it ends too early'})") from error
    if found != (rate, 1, 16):
        raise UserError(
            f"{where} has {found[0]} Hz, {found[1]} channel(s) and {found[2]} bits; it must have {rate} Hz, 1 and 16"
        )
    if frames == 0 or len(samples) != 2 * frames:
        raise UserError(f"{where} is cut short: it has {len(samples) // 2} of {frames} samples")
    return np.frombuffer(samples, "<i2").astype(np.int16)


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split())  # tarfile's has several lines
        raise UserError(f"{path} is cut short or damaged; download it again ({reason})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _tar_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header: a gigabyte for a million files
        if member.isfile():
            yield member


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is no file")
    return file


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()
