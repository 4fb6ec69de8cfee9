"""Packed files: recognised by their first bytes, unpacked within a bound, rejected by name unless they are text."""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.data import packed

TEXT = b"the quick brown fox\n" * 20


def in_zip(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in members:
            archive.writestr(name, contents)
    return buffer.getvalue()


def in_tar(contents: bytes, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        member = tarfile.TarInfo("text")
        member.size = len(contents)
        archive.addfile(member, io.BytesIO(contents))
    return buffer.getvalue()


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(9))
    return buffer.getvalue()


PACKERS = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zip": lambda data: in_zip(("__MACOSX/._text", b"junk"), ("folder/", b""), ("folder/text", data)),
}


@pytest.mark.parametrize("name", ["text", "text.txt", "text.GZ", "text.zip", "text.br"])
@pytest.mark.parametrize("kind", PACKERS)
def test_a_packed_text_is_read_whatever_its_name(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(PACKERS[kind](TEXT))
    assert packed.read_text(path) == TEXT
    assert packed.kind(path.read_bytes()[: packed.HEAD]) == kind


@pytest.mark.parametrize(
    "contents", [b"", b"\0" * 600, "\ufeffBOM".encode(), "text".encode("utf-16"), b"PK", b"BZh9 is text"]
)
def test_what_has_no_known_beginning_is_plain(tmp_path, contents):
    (tmp_path / "plain.txt").write_bytes(contents)
    assert packed.read_text(tmp_path / "plain.txt") == contents


REFUSED = {
    "zstd": b"\x28\xb5\x2f\xfd" + TEXT,
    "lz4": b"\x04\x22\x4d\x18" + TEXT,
    "7z": b"7z\xbc\xaf\x27\x1c" + TEXT,
    "rar": b"Rar!\x1a\x07\x01\x00" + TEXT,
    "compress": b"\x1f\x9d\x90" + TEXT,
    "PDF": b"%PDF-1.7\n" + TEXT,
    "HDF5": b"\x89HDF\r\n\x1a\n" + TEXT,
    "Parquet": b"PAR1\x15\x04" + TEXT,
    "numpy": numpy_file(),
    "tar": in_tar(TEXT),
    "PNG": b"\x89PNG\r\n\x1a\n" + TEXT,
}


@pytest.mark.parametrize("wrap", [bytes, gzip.compress, lambda data: in_zip(("text.txt", data))])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_text_is_refused_by_name(tmp_path, kind, wrap):
    path = tmp_path / "corpus.txt"
    path.write_bytes(wrap(REFUSED[kind]))
    verb = "is" if wrap is bytes else "holds"
    with pytest.raises(UserError, match=f"{path} {verb} a {kind} file, not text"):
        packed.read_text(path)


@pytest.mark.parametrize(
    "contents", [gzip.compress(gzip.compress(TEXT)), in_zip(("a.gz", gzip.compress(TEXT)))], ids=["gzip", "zip"]
)
def test_text_is_unpacked_once(tmp_path, contents):
    (tmp_path / "x").write_bytes(contents)
    with pytest.raises(UserError, match=r"x .* a gzip file, not text"):
        packed.read_text(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "claim"), [("a.gz", "gzip"), ("a.XZ", "xz"), ("a.zip", "zip"), ("a.txt.br", "brotli"), ("a.zst", "zstd")]
)
def test_a_plain_file_that_is_named_as_a_packed_one_is_refused(tmp_path, name, claim):
    (tmp_path / name).write_bytes(TEXT)
    with pytest.raises(UserError, match=f"{name} is named like a {claim} file but is not one: .* rename"):
        packed.read_text(tmp_path / name)


def test_a_zip_of_several_files_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(in_zip(("a", TEXT), ("b", TEXT)))
    with pytest.raises(UserError, match="x is a zip of 2 files: unpack it"):
        packed.read_text(tmp_path / "x")


def test_an_encrypted_zip_is_one_line(tmp_path):
    contents = bytearray(in_zip(("a", TEXT)))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flags of both headers
        contents[contents.index(signature) + offset] |= 1
    (tmp_path / "x").write_bytes(contents)
    with pytest.raises(UserError, match=r"x is cut short or damaged; .*encrypted") as caught:
        packed.read_text(tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PACKERS)
def test_a_bomb_is_not_read_whole(tmp_path, monkeypatch, kind):
    bomb = PACKERS[kind](bytes(10**6))
    (tmp_path / "x").write_bytes(bomb)
    assert len(packed.read_text(tmp_path / "x")) == 10**6, "small files may be as odd as they like"
    monkeypatch.setattr(packed, "MAX_UNCHECKED", 1000)
    monkeypatch.setattr(packed, "MOST_RATIO", 5)
    with pytest.raises(
        UserError, match=f"x holds more than {max(1000, 5 * len(bomb)):,} bytes, the limit for its packed size"
    ):
        packed.read_text(tmp_path / "x")


def test_no_more_than_half_of_the_memory_is_read(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(TEXT)
    monkeypatch.setattr(packed, "_memory", lambda: 2 * len(TEXT) - 2)
    with pytest.raises(UserError, match=f"more than {len(TEXT) - 1} bytes, .* .half of the memory"):
        packed.read_text(tmp_path / "x")
    monkeypatch.undo()
    assert packed.most_bytes(10**9) > 10**9 or packed._memory() < 2 * 10**9


def test_reading_stops_at_the_bound():
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size=-1):
            assert size >= 0
            self.given += size
            return bytes(size)

    stream = Endless()
    with pytest.raises(UserError, match=re.escape("here holds more than 3,000,000 bytes")):
        packed.read_bounded(stream, 3_000_000, "here")
    assert stream.given == 3_000_001


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"cannot read {tmp_path}"):
        packed.read_text(Path(tmp_path))
