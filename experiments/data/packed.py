"""Compressed files: detection by their first bytes rather than their names, and bounded decompression."""

import bz2
import contextlib
import gzip
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from experiments.common.errors import UserError

HEAD = 512  # bytes that identify a file: they include the first checksum of a tar

# Readers of single-file formats. Other recognised formats are rejected by name.
_OPEN: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "xz": lzma.open, "lzma": lzma.open, "bzip2": bz2.open}

_BEGINS = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "gzip": rb"\x1f\x8b",
        "xz": rb"\xfd7zXZ\x00",
        "lzma": rb"\x5d\x00\x00",
        "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
        "zip": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
        "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
        "lz4": rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18",
        "lzip": rb"LZIP[\x00\x01]",
        "lzop": rb"\x89LZO\x00",
        "compress": rb"\x1f[\x9d\xa0]",
        "snappy": rb"\xff\x06\x00\x00sNaPpY",
        "7z": rb"7z\xbc\xaf\x27\x1c",
        "rar": rb"Rar!\x1a\x07",
        "cab": rb"MSCF\x00\x00\x00\x00",
        "ar": rb"!<arch>\n",
        "PDF": rb"%PDF-",
        "HDF5": rb"\x89HDF\r\n\x1a\n",
        "numpy": rb"\x93NUMPY",
        "pickle": rb"\x80[\x02-\x05]",
        "Parquet": rb"PAR[1E][\x00-\x1f]",
        "Arrow": rb"ARROW1\x00",
        "Avro": rb"Obj\x01",
        "SQLite": rb"SQLite format 3\x00",
        "Office": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "JPEG": rb"\xff\xd8\xff",
        "GIF": rb"GIF8[79]a",
        "RIFF": rb"RIFF....(WAVE|AVI |WEBP)",
    }.items()
}

# Suffixes of compressed files only. Brotli has no magic number.
_SUFFIXES = {
    **dict.fromkeys((".gz", ".tgz"), "gzip"),
    **dict.fromkeys((".xz", ".txz"), "xz"),
    **dict.fromkeys((".bz2", ".tbz2"), "bzip2"),
    **dict.fromkeys((".zst", ".zstd"), "zstd"),
    **{".lzma": "lzma", ".zip": "zip", ".lz4": "lz4", ".lz": "lzip", ".lzo": "lzop", ".z": "compress"},
    **{".sz": "snappy", ".7z": "7z", ".rar": "rar", ".tar": "tar", ".br": "brotli"},
}

# Exceptions of the standard library for a truncated, modified, encrypted or hostile archive.
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error, EOFError),
    *(ValueError, OverflowError, RuntimeError, LookupError),
)

# Text compresses about 10 times; 100 times is too repetitive to be data. Contents of up to MAX_UNCHECKED bytes pass.
MOST_RATIO = 250
MAX_UNCHECKED = 2**26  # bytes
_BLOCK = 2**20


def kind(head: bytes) -> str | None:
    """The format of a file that begins with these bytes (HEAD or all): "gzip", "zip", "PDF", ...; None if unknown."""
    for name, pattern in _BEGINS.items():
        if pattern.match(head):
            return name
    try:
        tarfile.TarInfo.frombuf(head[:HEAD], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return "tar"


def most_bytes(packed: int) -> int:
    """The most bytes that a file of `packed` bytes may unpack to: MOST_RATIO times as many, within half of the
    memory."""
    return min(max(MAX_UNCHECKED, MOST_RATIO * packed), _memory() // 2)


def read_bounded(stream: IO[bytes], most: int, where: str) -> bytearray:
    """Reads the rest of a stream. Raises UserError naming `where` if it has more than `most` bytes."""
    found = bytearray()
    while block := stream.read(min(_BLOCK, most + 1 - len(found))):
        found += block
        if len(found) > most:
            raise UserError(
                f"{where} holds more than {most:,} bytes, the limit for its packed size ({MOST_RATIO} times) or for "
                "this machine (half of the memory): it is a decompression bomb, or needs a larger machine"
            )
    return found


def unpacked(stream: IO[bytes], stack: contextlib.ExitStack) -> IO[bytes]:
    """The decompressed stream of a gzip, xz or bzip2 file, or the stream itself, from the beginning."""
    opener = _OPEN.get(kind(peek(stream)) or "")
    return stream if opener is None else stack.enter_context(opener(stream))


def peek(stream: IO[bytes]) -> bytes:
    """The first bytes of a seekable stream, which is left at its beginning."""
    head = stream.read(HEAD)
    stream.seek(0)
    return head


def read_text(path: Path) -> bytearray:
    """The bytes of a text file: plain, packed by gzip, xz or bzip2, or the only file of a zip, whatever its name.

    Raises UserError for a file whose first bytes are those of a format other than text, a plain file with the suffix of
    a compressed one, contents beyond `most_bytes`, and damaged files.
    """
    with damage_named(path), contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        found = kind(peek(file))
        stream = _only_member(file, path, stack) if found == "zip" else unpacked(file, stack)
        contents = read_bounded(stream, most_bytes(path.stat().st_size), str(path))
    if (inner := kind(bytes(contents[:HEAD]))) is not None:
        what = f"is a {inner} file" if inner == found else f"holds a {inner} file"
        raise UserError(f"{path} {what}, not text: extract its text and name that file")
    claimed = _SUFFIXES.get(path.suffix.lower())
    if claimed and found is None:
        raise UserError(
            f"{path} is named like a {claimed} file but is not one: download or unpack it again, or rename "
            "it if it is plain text"
        )
    return contents


def _only_member(file: IO[bytes], path: Path, stack: contextlib.ExitStack) -> IO[bytes]:
    archive = stack.enter_context(zipfile.ZipFile(file))
    members = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise UserError(f"{path} is a zip of {len(members)} files: unpack it and name the files that hold the text")
    return stack.enter_context(archive.open(members[0]))


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns the standard library's exceptions for a bad archive into one line that names it."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # tarfile's messages have several lines
        raise UserError(f"{path} is cut short or damaged; download it again ({reason})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
