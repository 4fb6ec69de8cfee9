"""The descriptions of prepared data sets: every field that can be broken is named, in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.common.errors import UserError
from experiments.data import descriptions
from experiments.data.descriptions import FEATURES, INFO, read_description

SPLIT = {"name": "train", "shardLengths": ["3", 4], "numBytes": "70"}
GOOD = {"name": "letters", "version": "1.0.0", "fileFormat": "array_record", "splits": [SPLIT]}
LABEL = {"classLabel": {"numClasses": "2"}, "pythonClassName": "tensorflow_datasets.core.features.ClassLabel"}
GOOD_FEATURES = {"featuresDict": {"features": {"label": LABEL}}}


def write(directory: Path, info: Any = GOOD, features: Any = GOOD_FEATURES) -> Path:
    for name, contents in ((INFO, info), (FEATURES, features)):
        raw = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        (directory / name).write_bytes(raw)
    return directory


def split(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "splits": [{**SPLIT, **changes}]}


def test_a_good_one_is_read(tmp_path):
    found = read_description(write(tmp_path))
    train = found.splits["train"]
    assert train.files == tuple(f"letters-train.array_record-0000{n}-of-00002" for n in (0, 1))
    assert (train.lengths, train.size) == ((3, 4), 70)
    assert found.features == {"label": LABEL}
    template = split(filepathTemplate="{SPLIT}/{DATASET}.{FILEFORMAT}-{SHARD_INDEX}-{NUM_SHARDS}")
    assert read_description(write(tmp_path, template)).splits["train"].files[1] == (
        "train/letters.array_record-00001-00002"
    )
    assert read_description(write(tmp_path, split(shardLengths=[]))).splits["train"].lengths == ()


BROKEN_INFO = [
    (b"", "cannot read .*info"),
    (b"[]", "holds a list, not an object"),
    (b"\xff\xfe", "cannot read .*info"),
    (b'{"name": 1' + b"0" * 9000 + b"}", "cannot read .*info"),
    (b"[" * 100_000, "nested too deeply"),
    ({}, "holds tfrecord files"),
    ({**GOOD, "fileFormat": ["\x1b[2J"]}, r"holds \['\\x1b\[2J'\] files"),
    ({**GOOD, "name": float("nan")}, "name is NaN, expected a name"),
    ({**GOOD, "name": "../x"}, 'name is "../x", expected a name'),
    ({**GOOD, "version": None}, "version is missing or null"),
    ({**GOOD, "splits": None}, "splits is missing or null, expected a list"),
    ({**GOOD, "splits": {"train": 1}}, 'splits is {"train": 1}, expected a list'),
    ({**GOOD, "splits": []}, r"splits is \[\], expected a list"),
    ({**GOOD, "splits": ["train"]}, r'splits\[0\] is "train", expected an object'),
    ({**GOOD, "splits": [{}]}, r"splits\[0\].name is missing"),
    ({**GOOD, "splits": [SPLIT, SPLIT]}, r'splits\[1\].name is "train", expected a unique name'),
    (split(name="\x1b[2J"), r'splits\[0\].name is "\\u001b\[2J"'),
    (split(shardLengths=None), r"splits\[0\].shardLengths is missing or null, expected a list of numbers"),
    (split(shardLengths=["many"]), r'splits\[0\].shardLengths\[0\] is "many", expected a whole number'),
    (split(shardLengths=[1, -1]), r"splits\[0\].shardLengths\[1\] is -1"),
    (split(shardLengths=[float("inf")]), r"splits\[0\].shardLengths\[0\] is Infinity"),
    (split(shardLengths=[True]), r"splits\[0\].shardLengths\[0\] is true"),
    (split(shardLengths=["9" * 40]), r'splits\[0\].shardLengths\[0\] is "999'),
    (split(numBytes="x"), r'splits\[0\].numBytes is "x"'),
    (split(filepathTemplate=3), r"splits\[0\].filepathTemplate is 3, expected a string like"),
    (split(filepathTemplate="{"), r"splits\[0\].filepathTemplate is \"\{\", expected a string like"),
    (split(filepathTemplate="{X}"), r"splits\[0\].filepathTemplate"),
    (split(filepathTemplate="{DATASET.__class__}"), r"splits\[0\].filepathTemplate"),
    (split(filepathTemplate="{DATASET:>99999999999}"), r"splits\[0\].filepathTemplate"),
    (split(filepathTemplate="../{DATASET}"), "expected a file in this directory"),
    (split(filepathTemplate="/{DATASET}"), "expected a file in this directory"),
]
BROKEN_FEATURES = [
    (b"", "cannot read .*features"),
    ([], "holds a list, not an object"),
    ({}, "featuresDict.features is missing or null, expected an object"),
    ({"featuresDict": []}, "featuresDict.features is missing"),
    ({"featuresDict": {"features": {}}}, "featuresDict.features is {}"),
    ({"featuresDict": {"features": {"label": 3}}}, "featuresDict.features.label is 3, expected an object"),
    (
        {"featuresDict": {"features": {"label": {"sequence": [{"pythonClassName": "antigravity.Feature"}]}}}},
        'pythonClassName is "antigravity.Feature", expected a class of tensorflow_datasets',
    ),
]


def assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_description(directory)
    assert str(directory) in str(caught.value)
    assert str(caught.value).isprintable(), "one line, and nothing for a terminal to obey"


@pytest.mark.parametrize(("info", "message"), BROKEN_INFO)
def test_a_broken_info_is_named(tmp_path, info, message):
    assert_refused(write(tmp_path, info=info), message)


@pytest.mark.parametrize(("features", "message"), BROKEN_FEATURES)
def test_broken_features_are_named(tmp_path, features, message):
    assert_refused(write(tmp_path, features=features), message)


@pytest.mark.parametrize("name", [INFO, FEATURES])
def test_what_is_missing_or_no_file_or_too_large_is_named(tmp_path, monkeypatch, name):
    write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(descriptions, "MOST_BYTES", 10)
        assert_refused(tmp_path, f"cannot read .*{re.escape(INFO)}.*larger than 10 bytes")
    (tmp_path / name).unlink()
    assert_refused(tmp_path, f"{re.escape(name)} is missing")
    (tmp_path / name).mkdir()
    assert_refused(tmp_path, f"cannot read .*{re.escape(name)}")
