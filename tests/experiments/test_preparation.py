"""Data sets made from downloaded files: tiny archives prepared and read back, and every way in which they are bad."""

import dataclasses
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import socket
import struct
import sys
import tarfile
import wave
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorflow_datasets.core import shuffle

from experiments.common.errors import UserError
from experiments.data import archives, packed, pathfinder, preparation
from experiments.data.builders import _byte_blocks, aan, cifar10, imdb_reviews, speech_commands, spoken_digit
from experiments.data.preparation import make_builder
from experiments.data.sources import OWN_DATASETS, open_split
from experiments.training.experiment import build_task, read_config
from tests.helpers import grid

NAMES = ("aan", "cifar10", "enwik8", "imdb_reviews", "speech_commands", "spoken_digit", "text8", "wikitext103")
URLS = {
    "aan": "https://storage.googleapis.com/long-range-arena/lra_release.gz",
    "cifar10": cifar10.URL,
    "enwik8": "http://mattmahoney.net/dc/enwik8.zip",
    "imdb_reviews": imdb_reviews.URL,
    "speech_commands": speech_commands.URL,
    "spoken_digit": spoken_digit.URL,
    "text8": "http://mattmahoney.net/dc/text8.zip",
    "wikitext103": "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
}


@pytest.fixture(autouse=True)
def without_network_or_tensorflow(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    before = "tensorflow" in sys.modules
    yield
    assert ("tensorflow" in sys.modules) == before


@pytest.fixture
def small(monkeypatch):
    """Sources without a published SHA-256, and data sets of a few examples."""
    for name in NAMES:
        module = importlib.import_module(f"experiments.data.builders.{name}")
        owner = module if hasattr(module, "SOURCES") else module.Builder
        if hasattr(owner, "SOURCES"):
            monkeypatch.setattr(owner, "SOURCES", [dataclasses.replace(file, sha256=None) for file in owner.SOURCES])
        if issubclass(module.Builder, _byte_blocks.HundredMillionBuilder):
            monkeypatch.setattr(module.Builder, "CONTENTS", None)
    monkeypatch.setattr(_byte_blocks.HundredMillionBuilder, "SIZE", 1000)
    monkeypatch.setattr(_byte_blocks, "BLOCK", 64)
    monkeypatch.setattr(imdb_reviews.Builder, "EXPECTED", {"train": 4, "test": 2})
    monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", 2)
    monkeypatch.setattr(spoken_digit.Builder, "EXPECTED", 3)
    monkeypatch.setattr(speech_commands.SC10, "clips", 40)
    monkeypatch.setattr(speech_commands.SC35, "clips", 43)


def prepare(name: str, tmp_path: Path, config: str | None = None) -> Path:
    make = preparation.builder_class(name)
    return preparation.prepare(make(data_dir=tmp_path / "data", manual_dir=tmp_path / "manual", config=config))


def read(name: str, split: str, tmp_path: Path) -> list[dict[str, Any]]:
    source = open_split(name, split, str(tmp_path / "data"))
    return [source[index] for index in range(len(source))]


def refused(name: str, tmp_path: Path, config: str | None = None) -> str:
    """The one line that preparing ends with, and nothing that could be read as prepared is left."""
    with pytest.raises(UserError) as caught:
        prepare(name, tmp_path, config)
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, contents in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents)


def write_tar(path: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, contents in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return path


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that no compression makes shorter, so that a cut archive is cut inside a file."""
    return np.random.default_rng(seed).bytes(size)


def wav(samples: np.ndarray, rate: int = 16_000, channels: int = 1, bytes_per_sample: int = 2) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bytes_per_sample)
        file.setframerate(rate)
        file.writeframes(samples.astype(f"<i{bytes_per_sample}").tobytes())
    return buffer.getvalue()


def extensible(
    samples: np.ndarray, rate: int = 16_000, code: int = 1, tail: str = "000000001000800000aa00389b71"
) -> bytes:
    """A WAV file whose header is WAVE_FORMAT_EXTENSIBLE, with a chunk of an odd size before its samples."""
    data = samples.astype("<i2").tobytes()
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, rate, 2 * rate, 2, 16, 22, 16, 4) + struct.pack("<H", code)
    form += bytes.fromhex(tail)
    chunks = [(b"LIST", b"odd"), (b"fmt ", form), (b"data", data)]
    body = b"".join(name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for name, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def cut(path: Path, keep: float = 0.5) -> None:
    os.truncate(path, int(keep * path.stat().st_size))


# What the sources look like.

REVIEWS = {
    "aclImdb/README": b"read me",
    "aclImdb/train/neg/0_1.txt": b"bad \xe9 \xff",
    "aclImdb/train/neg/1_2.txt": b"worse",
    "aclImdb/train/pos/0_9.txt": b" good<br />\n",
    "aclImdb/train/pos/1_9.txt": noise(5000),
    "aclImdb/train/unsup/0_0.txt": b"who knows",
    "aclImdb/train/urls_pos.txt": b"http",
    "aclImdb/test/neg/0_3.txt": b"dull",
    "aclImdb/test/pos/0_10.txt": b"great",
}
CIFAR = {
    f"cifar-10-batches-bin/{name}": b"".join(
        bytes([(7 * number + k) % 10]) + noise(3072, 2 * number + k) for k in (0, 1)
    )
    for number, name in enumerate(
        ["data_batch_1.bin", *(f"data_batch_{k}.bin" for k in (5, 4, 3, 2)), "test_batch.bin"]
    )
}
DIGITS = {
    f"free-spoken-digit-dataset-1.0.9/recordings/{name}.wav": wav(np.arange(-5, 20 + length), 8000)
    for name, length in (("0_george_0", 0), ("7_theo_49", 5), ("7_theo_48", 6))
}
CLIPS = {
    f"{word}/{number:02d}_nohash_0.wav": wav(np.arange(16_000) % 251 - number)
    for word, count in (("yes", 21), ("go", 19))
    for number in range(count)
}
OTHER_CLIPS = {"yes/99_nohash_0.wav": wav(np.arange(15_999)), "go/98_nohash_0.wav": wav(np.arange(10_000))}
SPEECH = {
    "validation_list.txt": b"yes/00_nohash_0.wav\nbed/00_nohash_0.wav\n",
    **CLIPS,
    **OTHER_CLIPS,
    "bed/00_nohash_0.wav": wav(np.arange(-3, 0)),
    "_background_noise_/tap.wav": wav(np.arange(9), 44_100),
    "testing_list.txt": b"go/01_nohash_0.wav\n",
}
PAPERS = {
    "new_aan_pairs.train.tsv": b"1.0\tA1\tB1\tb'one'\tb\"it's\"\n0.0\tA2\tB2\ttwo \xff\x80\tzwei\r\n0\ta\tb\tc\td",
    "new_aan_pairs.eval.tsv": b'1\tA\tB\t"quoted" \ttwo\n',
    "new_aan_pairs.test.tsv": b"0.0\tA\tB\tone\ttwo\n\n",
}
WIKI = {
    f"wikitext-103-raw/wiki.{name}.raw": noise(size) for name, size in (("train", 500), ("valid", 64), ("test", 65))
}


def test_imdb_reviews_from_the_archive_and_from_the_directory(small, tmp_path):
    write_tar(tmp_path / "manual" / "aclImdb_v1.tar.gz", REVIEWS)
    assert prepare("imdb_reviews", tmp_path) == tmp_path / "data" / "imdb_reviews" / "plain_text" / "1.0.0"
    write(tmp_path / "other" / "manual", REVIEWS)
    prepare("imdb_reviews", tmp_path / "other")
    expected = {
        "train": [
            (b"bad \xe9 \xff", 0),
            (b"good<br />", 1),
            (REVIEWS["aclImdb/train/pos/1_9.txt"].strip(), 1),
            (b"worse", 0),
        ],
        "test": [(b"dull", 0), (b"great", 1)],
    }
    for split, pairs in expected.items():
        found, again = (read("imdb_reviews/plain_text", split, path) for path in (tmp_path, tmp_path / "other"))
        assert sorted((example["text"], int(example["label"])) for example in found) == sorted(pairs)
        assert found == again  # in the same order too


def test_cifar10_has_the_pixels_where_they_belong(small, tmp_path):
    write_tar(tmp_path / "manual" / "cifar-10-binary.tar.gz", CIFAR)
    prepare("cifar10", tmp_path)
    for split, size in (("train", 10), ("test", 2)):
        found = read("cifar10", split, tmp_path)
        assert len(found) == size
        for example in found:
            number = int(example["id"].removeprefix(f"{split}_".encode()))
            file = f"data_batch_{number // 2 + 1}.bin" if split == "train" else "test_batch.bin"
            record = CIFAR[f"cifar-10-batches-bin/{file}"][3073 * (number % 2) :]
            assert example["label"] == record[0]
            assert example["image"].dtype == np.uint8
            assert example["image"].shape == (32, 32, 3)
            for row, column, channel in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (31, 30, 2)):
                assert example["image"][row, column, channel] == record[1 + 1024 * channel + 32 * row + column]


@pytest.mark.parametrize("name", ["v1.0.9.tar.gz", "free-spoken-digit-dataset-1.0.9.tar.gz", None])
def test_spoken_digit(small, tmp_path, name):
    write_tar(tmp_path / "manual" / name, DIGITS) if name else write(tmp_path / "manual", DIGITS)
    prepare("spoken_digit", tmp_path)
    found = {example["audio/filename"]: example for example in read("spoken_digit", "train", tmp_path)}
    assert {key.decode(): int(example["label"]) for key, example in found.items()} == {
        "0_george_0.wav": 0,
        "7_theo_48.wav": 7,
        "7_theo_49.wav": 7,
    }
    assert found[b"7_theo_49.wav"]["audio"].dtype == np.int64
    assert found[b"7_theo_49.wav"]["audio"].tolist() == list(range(-5, 25))


def test_sc10_has_whole_clips_of_ten_words_in_shares_of_every_word(small, tmp_path, capsys):
    write_tar(tmp_path / "manual" / "speech_commands_v0.02.tar.gz", SPEECH, prefix="./")
    prepare("speech_commands", tmp_path, "sc10")
    assert "left out 2 of 42 clips that are not exactly 16,000 samples\n" in capsys.readouterr().err
    splits = {split: read("speech_commands/sc10", split, tmp_path) for split in ("train", "validation", "test")}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 28, "validation": 6, "test": 6}
    assert [sum(int(example["label"]) == 9 for example in examples) for examples in splits.values()] == [13, 3, 3]
    found = [example for examples in splits.values() for example in examples]
    assert sorted(example["filename"].decode() for example in found) == sorted(CLIPS)
    for example in found:
        word, number = example["filename"].decode().split("/")
        assert speech_commands.TEN_WORDS[example["label"]] == word
        assert example["audio"].dtype == np.int16
        np.testing.assert_array_equal(example["audio"], np.arange(16_000) % 251 - int(number[:2]))


def test_the_split_of_sc10_depends_on_names_alone():
    splits = speech_commands.stratified_split(CLIPS)
    assert splits == speech_commands.stratified_split(reversed(list(CLIPS)))
    assert splits != speech_commands.stratified_split(CLIPS, seed=1)
    # It must never change: these are the clips of a published split.
    assert sorted(name for name, split in splits.items() if split == "test") == [
        "go/09_nohash_0.wav",
        "go/11_nohash_0.wav",
        "go/15_nohash_0.wav",
        "yes/00_nohash_0.wav",
        "yes/15_nohash_0.wav",
        "yes/18_nohash_0.wav",
    ]


def test_sc35_has_the_splits_of_its_lists_and_the_samples_as_they_are(small, tmp_path):
    write(tmp_path / "manual" / "speech_commands_v0.02", SPEECH)
    prepare("speech_commands", tmp_path, "sc35")
    names = {
        split: {example["filename"].decode(): example for example in read("speech_commands/sc35", split, tmp_path)}
        for split in ("train", "validation", "test")
    }
    assert names["validation"].keys() == {"yes/00_nohash_0.wav", "bed/00_nohash_0.wav"}
    assert names["test"].keys() == {"go/01_nohash_0.wav"}
    assert len(names["train"]) == 40
    bed = names["validation"]["bed/00_nohash_0.wav"]
    assert bed["audio"].tolist() == [-3, -2, -1]
    assert (speech_commands.TEN_WORDS + speech_commands.OTHER_WORDS)[bed["label"]] == "bed"
    assert len(set(speech_commands.SC35.words)) == 35


@pytest.mark.parametrize("place", ["", "tsv_data", "lra_release/lra_release/tsv_data", "lra_release.gz"])
def test_aan_keeps_the_bytes_of_the_texts(small, tmp_path, place):
    if place.endswith(".gz"):
        write_tar(tmp_path / "manual" / place, PAPERS, prefix="lra_release/lra_release/tsv_data/")
    else:
        write(tmp_path / "manual" / place, PAPERS)
    prepare("aan", tmp_path)
    found = {
        split: sorted((e["text1"], e["text2"], int(e["label"])) for e in read("aan", split, tmp_path))
        for split in aan.FILES
    }
    assert found == {
        "train": [(b"b'one'", b'b"it\'s"', 1), (b"c", b"d", 0), (b"two \xff\x80", b"zwei", 0)],
        "validation": [(b'"quoted" ', b"two", 1)],
        "test": [(b"one", b"two", 0)],
    }


@pytest.mark.parametrize("name", ["enwik8", "text8"])
@pytest.mark.parametrize("suffix", [".zip", ".gz", ""])
def test_a_hundred_million_bytes_in_order(small, tmp_path, monkeypatch, name, suffix):
    contents = noise(1000)
    path = tmp_path / "manual" / f"{name}{suffix}"
    write_zip(path, {name: contents}) if suffix == ".zip" else write(
        path.parent, {path.name: gzip.compress(contents) if suffix else contents}
    )
    prepare(name, tmp_path)
    start = 0
    for split, size in (("train", 900), ("validation", 50), ("test", 50)):
        blocks = [example["bytes"] for example in read(name, split, tmp_path)]
        assert {block.dtype for block in blocks} == {np.dtype(np.uint8)}
        assert {len(block) for block in blocks[:-1]} <= {64}
        assert b"".join(block.tobytes() for block in blocks) == contents[start : start + size]
        start += size


@pytest.mark.parametrize("packed", [True, False])
def test_wikitext103(small, tmp_path, packed):
    manual = tmp_path / "manual"
    write_zip(manual / "wikitext-103-raw-v1.zip", WIKI) if packed else write(manual, WIKI)
    prepare("wikitext103", tmp_path)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        blocks = [example["bytes"].tobytes() for example in read("wikitext103", split, tmp_path)]
        assert b"".join(blocks) == WIKI[f"wikitext-103-raw/wiki.{name}.raw"]
        assert {len(block) for block in blocks[:-1]} <= {64}


def test_what_a_data_set_was_made_from_is_recorded(small, tmp_path):
    source = write_tar(tmp_path / "manual" / "cifar-10-binary.tar.gz", CIFAR)
    recorded = json.loads((prepare("cifar10", tmp_path) / "metadata.json").read_text())
    assert recorded == {f"source {source.name}": f"sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}"}


def test_more_than_fits_into_memory_is_shuffled_on_disk_in_the_same_order(small, tmp_path, monkeypatch):
    for place, limit in (("memory", shuffle.MAX_MEM_BUFFER_SIZE), ("disk", 100)):
        monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", limit)
        write(tmp_path / place / "manual", REVIEWS)
        files = sorted(path.name for path in prepare("imdb_reviews", tmp_path / place).iterdir())
        assert not [name for name in files if "bucket" in name]
    orders = [read("imdb_reviews/plain_text", "train", tmp_path / place) for place in ("memory", "disk")]
    assert orders[0] == orders[1]


def test_an_interrupted_preparation_is_run_again(small, tmp_path, monkeypatch):
    write(tmp_path / "manual", PAPERS)
    with monkeypatch.context() as patch:
        patch.setattr(aan, "parse", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare("aan", tmp_path)
    prepare("aan", tmp_path)
    assert len(read("aan", "train", tmp_path)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_without_its_source_one_line_says_what_to_do(tmp_path, name):
    config = "sc10" if name == "speech_commands" else None
    message = refused(name, tmp_path, config)
    assert f"download {URLS[name]} into it" in message
    assert str(tmp_path / "manual") in message
    full = {"speech_commands": "speech_commands/sc10", "imdb_reviews": "imdb_reviews/plain_text"}.get(name, name)
    command = (
        f"python -m experiments.prepare --dataset={full} --data_dir={tmp_path}/data --manual_dir={tmp_path}/manual"
    )
    assert message.endswith(f"then run: {command}")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-binary.tar.gz"),
        ("enwik8", "enwik8.zip"),
        ("imdb_reviews", "aclImdb_v1.tar.gz"),
        ("speech_commands", "speech_commands_v0.02.tar.gz"),
        ("spoken_digit", "free-spoken-digit-dataset-1.0.9.tar.gz"),
        ("text8", "text8.zip"),
        ("wikitext103", "wikitext-103-raw-v1.zip"),
    ],
)
def test_a_file_that_is_not_the_published_one_is_refused(tmp_path, name, file):
    write(tmp_path / "manual", {file: b"an error page"})
    message = refused(name, tmp_path)
    assert f"{tmp_path / 'manual' / file} is truncated, damaged or another version: its SHA-256 is" in message
    assert URLS[name] in message


def test_another_text_of_the_same_size_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.builder_class("enwik8"), "CONTENTS", "0" * 64)
    write(tmp_path / "manual", {"enwik8": noise(1000)})
    assert "has the size of enwik8 but different contents" in refused("enwik8", tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_a_part_of_enwik8_is_not_enwik8(small, tmp_path, suffix):
    write(tmp_path / "manual", {f"enwik8{suffix}": gzip.compress(noise(321)) if suffix else noise(321)})
    message = refused("enwik8", tmp_path)
    assert "has 321 bytes (unpacked) instead of 1,000" in message
    assert "are not enwik8; configs/lm/bytes.py trains on" in message


@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 0.97])
@pytest.mark.parametrize(
    ("name", "file", "files"),
    [
        ("imdb_reviews", "aclImdb_v1.tar.gz", REVIEWS),
        ("wikitext103", "wikitext-103-raw-v1.zip", WIKI),
        ("enwik8", "enwik8.gz", {}),
        ("aan", "lra_release.gz", {**PAPERS, "new_aan_pairs.eval.tsv": b"1\ta\tb\t" + noise(9000).hex().encode()}),
    ],
)
def test_a_cut_archive_is_named(small, tmp_path, name, file, files, keep):
    path = tmp_path / "manual" / file
    if file == "enwik8.gz":
        write(path.parent, {file: gzip.compress(noise(1000))})
    else:
        (write_zip if path.suffix == ".zip" else write_tar)(path, files)
    cut(path, keep)
    message = refused(name, tmp_path)
    assert message.startswith(f"{path} ")
    assert re.search("is cut short or damaged; download it again|has 0 bytes", message)


def test_changed_bytes_in_a_zip_are_named(small, tmp_path):
    path = write_zip(tmp_path / "manual" / "wikitext-103-raw-v1.zip", WIKI)
    contents = bytearray(path.read_bytes())
    contents[200:210] = bytes(10)
    path.write_bytes(contents)
    assert refused("wikitext103", tmp_path).startswith(f"{path} is cut short or damaged")


def test_a_member_that_is_missing_is_named(small, tmp_path):
    write_zip(tmp_path / "manual" / "wikitext-103-raw-v1.zip", {"wikitext-103-raw/wiki.train.raw": b"text"})
    assert "wikitext-103-raw-v1.zip has no file wiki.valid.raw" in refused("wikitext103", tmp_path)


def test_reviews_that_are_missing_are_counted(small, tmp_path):
    write(tmp_path / "manual", {name: text for name, text in REVIEWS.items() if "1_9" not in name})
    assert "aclImdb has 3 labelled train reviews instead of 4" in refused("imdb_reviews", tmp_path)


@pytest.mark.parametrize("target", ["common.files.hashlib.file_digest", "data.archives.tarfile.open"])
def test_a_disk_that_fails_is_named(small, tmp_path, monkeypatch, target):
    path = write_tar(tmp_path / "manual" / "aclImdb_v1.tar.gz", REVIEWS)

    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"experiments.{target}", fails)
    assert refused("imdb_reviews", tmp_path) == f"cannot read {path}: [Errno 5] Input/output error"


def test_no_name_in_an_archive_is_written_to_disk(small, tmp_path):
    evil = {"../../evil.txt": b"x", "/tmp/evil-of-seqboat": b"x", "aclImdb/train/pos/../../../../evil.txt": b"x"}
    write_tar(tmp_path / "manual" / "aclImdb_v1.tar.gz", {**evil, **REVIEWS})
    prepare("imdb_reviews", tmp_path)
    assert not list(tmp_path.rglob("*evil*"))
    assert len(read("imdb_reviews/plain_text", "train", tmp_path)) == 4


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (noise(3000), "data_batch_1.bin is cut short or damaged: it has 3,000 bytes instead of 6,146"),
        (bytes(3073) + b"\x0a" + bytes(3072), "data_batch_1.bin, image 1 has the label 10; the last is 9"),
    ],
)
def test_damaged_images_are_named(small, tmp_path, contents, message):
    write(tmp_path / "manual", {**CIFAR, "cifar-10-batches-bin/data_batch_1.bin": contents})
    assert message in refused("cifar10", tmp_path)


BAD_RECORDINGS = [
    (wav(np.arange(99), 44_100), r"has 44100 Hz, 1 channel\(s\) and 16 bits; it must have {rate} Hz, 1 and 16"),
    (wav(np.arange(98), channels=2), r"has 16000 Hz, 2 channel\(s\) and 16 bits"),
    (wav(np.arange(98), bytes_per_sample=4), r"has 16000 Hz, 1 channel\(s\) and 32 bits"),
    (wav(np.arange(99), rate=8000)[:100], "has 8000 Hz|is cut short: it has 28 of 99 samples"),
    (wav(np.arange(99))[:20], "is damaged or not a WAV file"),
    (b"", "is damaged or not a WAV file"),
    (b"<html>not found</html>", "is damaged or not a WAV file"),
]


@pytest.mark.parametrize(("contents", "message"), BAD_RECORDINGS)
@pytest.mark.parametrize(
    ("name", "config", "files", "folder", "member", "rate"),
    [
        ("speech_commands", "sc10", SPEECH, "speech_commands_v0.02", "yes/00_nohash_0.wav", 16_000),
        ("spoken_digit", None, DIGITS, "free-spoken-digit-dataset-1.0.9", "recordings/7_theo_49.wav", 8_000),
    ],
)
def test_bad_recordings_are_named(small, tmp_path, name, config, files, folder, member, rate, contents, message):
    root = tmp_path / "manual" / folder
    write(root if config else tmp_path / "manual", files)
    write(root, {member: contents})
    found = refused(name, tmp_path, config)
    assert found.startswith(f"{root}: {member} ")
    assert re.search(message.format(rate=rate), found)


def test_a_cut_recording_is_named():
    samples = np.arange(-50, 50)
    np.testing.assert_array_equal(archives.read_wav("x.wav", wav(samples), 16_000), samples)
    with pytest.raises(UserError, match=r"^x\.wav is cut short: it has 78 of 100 samples$"):
        archives.read_wav("x.wav", wav(samples)[:-44], 16_000)
    with pytest.raises(UserError, match="is empty"):
        archives.read_wav("x.wav", wav(samples[:0]), 16_000)


def test_an_extensible_header_is_read():
    samples = np.arange(-50, 50)
    np.testing.assert_array_equal(archives.read_wav("x.wav", extensible(samples), 16_000), samples)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (extensible(np.arange(9), code=3), r"x is unsupported \(format 3\); it must be PCM"),
        (extensible(np.arange(9), tail="00" * 14), r"x is unsupported \(format 65534\)"),
        (wav(np.arange(9)).replace(b"\1\0\1\0", b"\7\0\1\0", 1), r"x is unsupported \(format 7\)"),
        (wav(np.arange(9))[:44].replace(b"data", b"LIST"), "x is damaged or not a WAV file .it has no chunk b'data'"),
        (b"RIFX" + wav(np.arange(9))[4:], "x is damaged or not a WAV file .it does not begin with RIFF"),
        (wav(np.arange(9))[:40] + b"\xff\xff\xff\xff" + bytes(18), "x is cut short: it has 9 of"),
        (wav(np.arange(9))[:16] + b"\4\0\0\0" + wav(np.arange(9))[20:], "x is damaged or not a WAV file"),
    ],
)
def test_other_recordings_are_named(contents, message):
    with pytest.raises(UserError, match=message):
        archives.read_wav("x", contents, 16_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"testing_list.txt": b"go/\xff.wav\n"}, "testing_list.txt is damaged or not a list of clips: it is not UTF-8"),
        ({"testing_list.txt": None}, "has no file testing_list.txt"),
        ({"testing_list.txt": b"go/none.wav\n"}, "lacks 1 clips that its lists name, such as go/none.wav"),
        ({"yes/00_nohash_0.wav": None, "validation_list.txt": b""}, "has 42 clips for sc35 instead of 43"),
    ],
)
def test_incomplete_speech_is_refused(small, tmp_path, change, message):
    files = {name: text for name, text in {**SPEECH, **change}.items() if text is not None}
    write(tmp_path / "manual" / "speech_commands_v0.02", files)
    assert message in refused("speech_commands", tmp_path, "sc35")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"1.0\tA\tB\ttext", " has 4 columns instead of 5: label, id1, id2, text1, text2"),
        (b"1.0\tA\tB\tone\ttwo\tthree", " has 6 columns instead of 5"),
        (b"label\tid1\tid2\ttext1\ttext2", ": the label is 'label' instead of 0 or 1"),
        (b"2.0\tA\tB\tone\ttwo", ": the label is '2.0' instead of 0 or 1"),
        (b"1.0\tA\tB\t\ttwo", ": text1 is empty"),
        (b"1.0\tA\tB\tone\t", ": text2 is empty"),
    ],
)
def test_a_bad_row_is_named(small, tmp_path, row, message):
    write(tmp_path / "manual", {**PAPERS, "new_aan_pairs.eval.tsv": b"0.0\tA\tB\tone\ttwo\n" + row + b"\n"})
    where = f"{tmp_path / 'manual' / 'new_aan_pairs.eval.tsv'}, row 2"
    assert refused("aan", tmp_path).startswith(f"{where}{message}")


def test_missing_tables_are_named(small, tmp_path):
    write(tmp_path / "manual" / "tsv_data", {"new_aan_pairs.eval.tsv": PAPERS["new_aan_pairs.eval.tsv"]})
    message = refused("aan", tmp_path)
    assert f"{tmp_path / 'manual' / 'tsv_data'} lacks new_aan_pairs.train.tsv and new_aan_pairs.test.tsv" in message
    assert "https://storage.googleapis.com/long-range-arena/lra_release.gz" in message


def test_an_empty_table_is_named(small, tmp_path):
    write(tmp_path / "manual", {**PAPERS, "new_aan_pairs.test.tsv": b"\n"})
    assert "new_aan_pairs.test.tsv is empty" in refused("aan", tmp_path)


# Hostile archives.


def tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header that claims any size; beyond eight octal digits in base 256, as GNU tar writes it."""
    member = tarfile.TarInfo(name)
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = (
        b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" + size.to_bytes(11, "big", signed=True)
    )
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(tar_header("aclImdb/train/neg/0_1.txt", 2**62) + bytes(1024), id="a file of exabytes"),
        pytest.param(tar_header("x", 2**62, b"x") + bytes(1024), id="a header of exabytes"),
        pytest.param(tar_header("x", 2**62, b"L") + bytes(1024), id="a name of exabytes"),
        pytest.param(tar_header("x", -1024) + bytes(1024), id="a size below 0"),
        pytest.param(tar_header("x", -512, b"x") + bytes(1024), id="a header that points at itself"),
        pytest.param((tar_header("x", 512, b"x") + b"9 a=b\n".ljust(512, b"\0")) * 3000, id="headers of headers"),
        pytest.param(b"\0" * 2048, id="nothing"),
    ],
)
def test_a_hostile_tar_is_one_line(small, tmp_path, contents):
    write(tmp_path / "manual", {"aclImdb_v1.tar.gz": gzip.compress(contents)})
    assert str(tmp_path / "manual" / "aclImdb_v1.tar.gz") in refused("imdb_reviews", tmp_path)


def test_links_and_devices_of_a_tar_are_not_files(small, tmp_path):
    path = tmp_path / "manual" / "aclImdb_v1.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"aclImdb/train/neg/{number}_1.txt")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert "has 0 labelled train reviews instead of 4" in refused("imdb_reviews", tmp_path)


@pytest.mark.parametrize("make", [write_tar, write_zip])
def test_a_name_that_is_there_twice_or_not_utf8_is_refused(small, tmp_path, make, monkeypatch):
    path = make(tmp_path / "x", {"a/1.txt": b"one", "b/1.txt": b"two"})
    monkeypatch.setattr(archives, "_plain", lambda name: name[2:])
    with pytest.raises(UserError, match=r"x holds '1\.txt' twice"):
        list(archives.read_files(path, lambda _: True))
    monkeypatch.setattr(archives, "_plain", lambda name: "\udcff")
    with pytest.raises(UserError, match=r"x holds a file whose name is not UTF-8: '\\udcff'"):
        list(archives.read_files(path, lambda _: True))


@pytest.mark.parametrize("make", [write_tar, write_zip])
def test_a_bomb_in_an_archive_is_not_read_whole(small, tmp_path, monkeypatch, make):
    monkeypatch.setattr(packed, "MAX_UNCHECKED", 10_000)
    path = make(tmp_path / "x", {"small": bytes(10_000), "large": bytes(10**7)})
    with pytest.raises(UserError, match=r"x.* (holds more than|asks for)"):
        list(archives.read_files(path, lambda _: True))
    assert [len(text) for _, text in archives.read_files(path, lambda name: name == "small")] == [10_000]


def test_enwik8_that_unpacks_to_more_is_refused(small, tmp_path):
    write(tmp_path / "manual", {"enwik8.gz": gzip.compress(bytes(10**6))})
    assert "has more bytes (unpacked) instead of 1,000" in refused("enwik8", tmp_path)


def test_a_row_without_an_end_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(aan, "MOST_BYTES", 100)
    write(tmp_path / "manual", {**PAPERS, "new_aan_pairs.train.tsv": b"1\ta\tb\t" + b"x" * 1000})
    assert "new_aan_pairs.train.tsv, row 1 has more than 100 bytes" in refused("aan", tmp_path)


# What the program does around it.


def test_what_a_killed_preparation_left_is_removed_and_one_under_way_is_not(small, tmp_path):
    write(tmp_path / "manual", PAPERS)
    left, other = (tmp_path / "data" / "aan" / f"incomplete.ABC123_{version}" for version in ("1.0.0", "2.0.0"))
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "aan-train.array_record").write_bytes(b"half")
    with preparation._alone(tmp_path / "data" / "aan" / "1.0.0"):
        left.mkdir()
        with pytest.raises(UserError, match=r"aan/1\.0\.0 is being prepared by another process"):
            prepare("aan", tmp_path)
        assert left.exists()
    prepare("aan", tmp_path)
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize("processes", [0, -1, 100_000])
def test_the_number_of_processes_is_bounded(tmp_path, processes):
    with pytest.raises(UserError, match=rf"processes is {processes}; it must be in 1\.\.\d+ on this machine"):
        preparation.builder_class("listops")(data_dir=tmp_path, processes=processes)


def test_places_that_cannot_be_are_named(tmp_path):
    for place in ("gs://bucket/x", "~nosuchuser/x"):
        with pytest.raises(UserError, match="--manual_dir"):
            make_builder("aan", data_dir=tmp_path, manual_dir=place)


@pytest.mark.parametrize("contents", ["", "[]", '{"name": 1}', '{"splits": 1}'])
def test_a_damaged_data_set_is_not_there_already(small, tmp_path, contents):
    write(tmp_path / "manual", PAPERS)
    (prepare("aan", tmp_path) / "dataset_info.json").write_text(contents)
    with pytest.raises(UserError, match=r"cannot (be )?read|holds tfrecord|dataset_info\.json") as caught:
        make_builder("aan", data_dir=tmp_path / "data").is_prepared()
    assert "\n" not in str(caught.value)


# Everything that the program offers is opened by a recipe.

OFFERED = {
    "aan": "lra.retrieval",
    "cifar10": "lra.image",
    "enwik8": "lm.enwik8",
    "imdb_reviews": "lra.text",
    "listops": "lra.listops",
    "pathfinder/32_easy": "lra.pathfinder",
    "pathfinder/32_intermediate": "lra.pathfinder",
    "pathfinder/32_hard": "lra.pathfinder",
    "pathfinder/128_easy": "lra.pathx",
    "pathfinder/128_intermediate": "lra.pathx",
    "pathfinder/128_hard": "lra.pathx",
    "speech_commands/sc10": "speech.sc10",
    "speech_commands/sc35": "speech.sc35",
    "spoken_digit": "speech.spoken_digit",
    "text8": "lm.text8",
    "wikitext103": "lm.wikitext103",
}


def every_offer() -> list[tuple[str, float]]:
    """Each --dataset, and with --scale where it is generated."""
    names = [
        (name, f"{name}/{config.name}" if len(builder.BUILDER_CONFIGS) > 1 else name)
        for name, builder in ((name, preparation.builder_class(name)) for name in OWN_DATASETS)
        for config in builder.BUILDER_CONFIGS or [None]
    ]
    scaled = [full for name, full in names if hasattr(preparation.builder_class(name), "SIZES")]
    return [(full, 1.0) for _, full in names] + [(name, scale) for name in scaled for scale in (0.5, 3e-05)]


def write_sources(manual: Path) -> None:
    digits = {f"recordings/3_ann_{number}.wav": wav(np.arange(number + 9), 8000) for number in (0, 6, 20)}
    write(
        manual, {**{f"free-spoken-digit-dataset-1.0.9/{name}": contents for name, contents in digits.items()}, **PAPERS}
    )
    write(manual, {**REVIEWS, **CIFAR, **WIKI, "enwik8": noise(1000), "text8": noise(1000)})
    write(manual / "speech_commands_v0.02", SPEECH)


def blank_pictures(parameters, seed, split, size, processes):
    """Drawing one of 128 x 128 takes a second."""
    picture = np.zeros((parameters.size, parameters.size), np.uint8)
    return iter([SimpleNamespace(image=picture, label=number % 2) for number in range(size)])


# Of those that are generated, one at a smaller scale.
@pytest.mark.parametrize(
    ("dataset", "scale"), grid(every_offer(), *(offer for offer in every_offer() if offer[1] == 1), ("listops", 3e-05))
)
def test_what_is_offered_is_opened_by_a_recipe(small, tmp_path, monkeypatch, dataset, scale):
    builder_class = preparation.builder_class(dataset.partition("/")[0])
    if hasattr(builder_class, "SIZES"):
        most = round(2 / scale)
        monkeypatch.setattr(builder_class, "SIZES", {"train": most, "validation": most, "test": most})
    monkeypatch.setattr(pathfinder, "generate_split", blank_pictures)
    write_sources(tmp_path / "manual")
    builder = make_builder(dataset, scale, data_dir=tmp_path / "data", manual_dir=tmp_path / "manual")
    where = preparation.prepare(builder).relative_to(tmp_path / "data")
    config = importlib.import_module(f"configs.{OFFERED[dataset]}").get_config()
    config.data_dir = str(tmp_path / "data")
    if "dataset" in config.task:
        config.task.dataset = str(where.parent)
    if "validation_fraction" in config.task:
        config.task.validation_fraction = 0.5
    config.train.update(batch_size=1, accumulate=1)
    task = build_task(read_config(config.to_dict()))
    assert any(str(where.parent) in name for name in task.fingerprint)
    assert len(task.train_batch(0)["lengths"]) == 1
    assert all(next(task.evaluation_batches(split))["weights"].any() for split in task.splits)


def test_every_offer_has_a_recipe():
    assert {name for name, _ in every_offer()} == OFFERED.keys()
