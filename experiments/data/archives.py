"""Files inside a directory, a tar or a zip, read in place without unpacking to disk."""

import contextlib
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Int16

from experiments.common.errors import UserError
from experiments.data.packed import damage_named, kind, most_bytes, peek, read_bounded, unpacked


def read_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields name and contents of the files of a directory, a tar or a zip whose names are `wanted`.

    Names are relative, with slashes and no leading "./", in sorted order for a directory and in the archive's own order
    otherwise. Raises UserError naming the archive if it is damaged, has a duplicate or non-UTF-8 name, or a file is
    larger than `most_bytes` allows for the archive's size.
    """
    seen: set[str] = set()
    with damage_named(path):
        for name, read in _files(path):
            if not wanted(name):
                continue
            if name in seen:
                raise UserError(f"{path} holds {name!r} twice: it is damaged or a different archive; download it again")
            if name != name.encode(errors="replace").decode():
                raise UserError(f"{path} holds a file whose name is not UTF-8: {name!r}")
            seen.add(name)
            yield name, read()


def _files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the name of every file and a function that reads it, valid until the next is yielded."""
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield file.relative_to(path).as_posix(), partial(_read, partial(open, file, "rb"), file, str(file))
        return
    with contextlib.ExitStack() as stack:
        for name, open_member in _members(path, stack):
            yield _plain(name), partial(_read, open_member, path, f"{path}: {name}")


def _read(open_member: Callable[[], Any], packed: Path, where: str) -> bytes:
    with open_member() as stream:
        return bytes(read_bounded(stream, most_bytes(packed.stat().st_size), where))


def _members(path: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Yields the name of every file of a zip or a tar, in its order, and a function that opens it, as above."""
    file = stack.enter_context(path.open("rb"))
    if kind(peek(file)) == "zip":
        archive = stack.enter_context(zipfile.ZipFile(file))
        yield from ((i.filename, partial(archive.open, i)) for i in archive.infolist() if not i.is_dir())
        return
    stream = cast(IO[bytes], _Forward(unpacked(file, stack), most_bytes(path.stat().st_size)))
    tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r:"))  # noqa: SIM115
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header: a gigabyte for a million files
        if member.isfile():
            yield member.name, partial(_open_member, tar, member)


class _Forward:
    """A forward-only stream for tarfile that never reads more than `most` bytes at once.

    A hostile header can make tarfile read an endless stream to its end, or loop forever at one place.
    """

    def __init__(self, stream: IO[bytes], most: int):
        self._stream, self._most = stream, most
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._most:
            raise tarfile.ReadError(f"a header asks for {size:,} bytes")
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        if position < self.tell():
            raise tarfile.ReadError("a header points backwards")
        return self._stream.seek(position)


@contextlib.contextmanager
def open_file(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Opens the one file with this base name, in a directory, tar or zip, or `path` itself, which may be gzipped.

    Raises UserError if there is none, or if the archive proves to be damaged while the file is read.
    """
    with damage_named(path), contextlib.ExitStack() as stack:
        yield _find(path, name, stack)


def _find(path: Path, name: str, stack: contextlib.ExitStack) -> IO[bytes]:
    if path.is_dir():
        if (path / name).is_file():
            return stack.enter_context((path / name).open("rb"))
    elif path.name in (name, f"{name}.gz") and kind(peek(stream := _stream(path, stack))) is None:
        return stream
    else:
        for member, open_member in _members(path, stack):
            if PurePosixPath(member).name == name:
                return stack.enter_context(open_member())
    raise UserError(f"{path} has no file {name}: it is incomplete or a different archive")


def _stream(path: Path, stack: contextlib.ExitStack) -> IO[bytes]:
    return unpacked(stack.enter_context(path.open("rb")), stack)


# A WAVE_FORMAT_EXTENSIBLE header gives its format as a GUID: two bytes, then these.
_EXTENSIBLE, _GUID = 0xFFFE, bytes.fromhex("000000001000800000aa00389b71")
_PCM = 1


def read_wav(where: str, contents: bytes, rate: int) -> Int16[np.ndarray, " L"]:
    """The samples of a 16-bit mono WAV file at this rate in Hz. Raises UserError naming `where` for anything else.

    Not by the standard library's `wave`, which accepts different files in different Python versions.
    """
    try:
        chunks = dict(_chunks(contents))
        code, channels, found_rate, _, _, bits = struct.unpack_from("<HHIIHH", chunks[b"fmt "][1])
        size, data = chunks[b"data"]
    except (struct.error, KeyError, ValueError) as error:
        raise UserError(f"{where} is damaged or not a WAV file ({_reason(error)})") from error
    extension = chunks[b"fmt "][1][24:40]
    if code == _EXTENSIBLE and extension[2:] == _GUID:
        code = int.from_bytes(extension[:2], "little")
    if code != _PCM:
        raise UserError(f"{where} is unsupported (format {code}); it must be PCM, format {_PCM}")
    if (found_rate, channels, bits) != (rate, 1, 16):
        raise UserError(
            f"{where} has {found_rate} Hz, {channels} channel(s) and {bits} bits; it must have {rate} Hz, 1 and 16"
        )
    if size == 0:
        raise UserError(f"{where} is empty: it has no samples")
    if len(data) < size or size % 2:
        raise UserError(f"{where} is cut short: it has {len(data) // 2} of {-(-size // 2)} samples")
    return np.frombuffer(data, "<i2").astype(np.int16)


def _chunks(contents: bytes) -> Iterator[tuple[bytes, tuple[int, bytes]]]:
    """Yields name, claimed size and available bytes of every chunk of a RIFF file up to its data."""
    if contents[:4] != b"RIFF" or contents[8:12] != b"WAVE":
        raise ValueError("it does not begin with RIFF and WAVE")
    position, name = 12, b""
    while name != b"data" and position + 8 <= len(contents):
        name, size = struct.unpack_from("<4sI", contents, position)
        yield name, (size, contents[position + 8 : position + 8 + size])
        position += 8 + size + size % 2


def _reason(error: Exception) -> str:
    return f"it has no chunk {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is not a file")
    return file


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()
