"""Prepared data sets: made, read back, and every way in which they can be missing or broken named at once."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.data import listops, preparation
from experiments.data.builders.listops import Builder as ListOps
from experiments.data.sources import OWN_DATASETS, data_directory, open_split

PARAMETERS = listops.ListOpsParameters(max_depth=4, max_arguments=5, min_length=7, max_length=60)
# 64 KiB is one block of array_record: train must have several for a cut file to be something else than a short one.
SIZES = {"train": 3000, "validation": 20, "test": 10}


def make(data_dir: Path, processes: int = 1, sizes: dict[str, int] = SIZES) -> ListOps:
    return ListOps(data_dir=data_dir, processes=processes, sizes=sizes, parameters=PARAMETERS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data")
    assert preparation.prepare(make(data_dir)) == data_dir / "listops" / "1.0.0"
    return data_dir


@pytest.fixture
def data_dir(prepared, tmp_path, monkeypatch) -> Path:
    """A copy to break, on a machine without a network."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    return shutil.copytree(prepared, tmp_path / "copy")


def shard(data_dir: Path, split: str = "train") -> Path:
    return data_dir / "listops" / "1.0.0" / f"listops-{split}.array_record-00000-of-00001"


def edit_info(data_dir: Path, **changes) -> None:
    path = data_dir / "listops" / "1.0.0" / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_was_prepared_is_what_is_generated(data_dir):
    seen: set[bytes] = set()
    for number, (split, size) in enumerate(SIZES.items()):
        expected = list(listops.generate_split(PARAMETERS, ListOps.SEED, number, size, seen))
        source = open_split("listops", split, str(data_dir))
        examples = [source[index] for index in range(len(source))]
        assert {example["tokens"].dtype for example in examples} == {np.dtype(np.uint8)}
        # tensorflow-datasets shuffles what it writes.
        found = [(example["tokens"].tolist(), int(example["label"])) for example in examples]
        assert sorted(found) == sorted(expected)
        assert found[:5] != expected[:5]


def test_preparing_again_writes_nothing(data_dir):
    before = shard(data_dir).stat().st_mtime_ns
    preparation.prepare(make(data_dir))
    assert shard(data_dir).stat().st_mtime_ns == before


@pytest.mark.breadth  # test_tasks.py: test_the_number_of_processes_and_where_training_starts_change_no_batch
def test_the_number_of_processes_changes_neither_examples_nor_order(tmp_path):
    """The files' bytes may differ: protobuf writes the features of an example in either order, run by run."""
    few = {"train": 300, "validation": 10, "test": 10}
    for processes in (1, 2):
        preparation.prepare(make(tmp_path / str(processes), processes, few))
    for split, size in few.items():
        sources = [open_split("listops", split, str(tmp_path / processes)) for processes in ("1", "2")]
        found = [
            [(source[index]["tokens"].tolist(), int(source[index]["label"])) for index in range(len(source))]
            for source in sources
        ]
        assert len(found[0]) == size
        assert found[0] == found[1]


def test_an_interrupted_preparation_is_not_read_and_can_be_run_again(tmp_path, monkeypatch):
    def interrupted(*_):
        yield from listops.generate_chunk(PARAMETERS, 0, 0, 0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(listops, "generate_split", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare(make(tmp_path))
    # What a killed process leaves, which can tidy nothing up.
    (tmp_path / "listops" / "incomplete.ABC123_1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match="is not in"):
        open_split("listops", "train", str(tmp_path))
    preparation.prepare(make(tmp_path))
    assert len(open_split("listops", "train", str(tmp_path))) == SIZES["train"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file"):
        preparation.prepare(make(tmp_path / "file"))


def test_the_newest_version_is_read(data_dir):
    versions = data_dir / "listops"
    (versions / "0.9.0").mkdir()
    (versions / "0.9.0" / "dataset_info.json").write_text("{}")
    shutil.copytree(versions / "1.0.0", versions / "1.10.0")
    shutil.copytree(versions / "1.0.0", versions / "1.9.0")
    shutil.copytree(versions / "1.0.0", versions / "incomplete.ABC123_2.0.0")
    shutil.rmtree(versions / "1.0.0")
    shard(data_dir).parent.parent.joinpath("1.9.0", shard(data_dir).name).unlink()
    assert len(open_split("listops", "train", str(data_dir))) == SIZES["train"]


def test_a_missing_data_set_of_ours_comes_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    where = tmp_path / "my data"
    command = f"python -m experiments.prepare --dataset=listops --data_dir='{where}'"
    with pytest.raises(UserError) as caught:
        open_split("listops", "train", str(where))
    assert f"is not in {where} " in str(caught.value)
    assert command in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_stock_data_set_says_where_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="machine that has TensorFlow") as caught:
        open_split("mnist", "train", str(tmp_path))
    assert 'tfds.builder("mnist", file_format="array_record")' in str(caught.value)
    assert str(tmp_path / "mnist") in str(caught.value)


def test_tfrecord_files_are_refused(data_dir):
    edit_info(data_dir, fileFormat="tfrecord")
    with pytest.raises(UserError, match=r"1\.0\.0 holds tfrecord files, .* file_format=\"array_record\""):
        open_split("listops", "train", str(data_dir))


def test_an_unknown_split_is_named(data_dir):
    with pytest.raises(UserError, match="no split 'dev'; it has: train, validation, test"):
        open_split("listops", "dev", str(data_dir))


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_truncated_file_is_named(data_dir, keep):
    os.truncate(shard(data_dir), int(keep * shard(data_dir).stat().st_size))
    with pytest.raises(UserError, match="damaged or truncated; copy it again") as caught:
        open_split("listops", "train", str(data_dir))
    assert str(shard(data_dir)) in str(caught.value)


def test_a_missing_file_is_named(data_dir):
    for path in (shard(data_dir), shard(data_dir).parent / "features.json"):
        path.rename(path.with_suffix(".away"))
        with pytest.raises(UserError, match="is missing; copy it again") as caught:
            open_split("listops", "train", str(data_dir))
        assert str(path) in str(caught.value)
        path.with_suffix(".away").rename(path)


def test_a_file_with_another_number_of_examples_is_named(data_dir):
    shutil.copy(shard(data_dir, "test"), shard(data_dir))
    with pytest.raises(UserError, match=f"holds 10 examples instead of {SIZES['train']}"):
        open_split("listops", "train", str(data_dir))


def test_a_broken_description_is_named(data_dir):
    path = data_dir / "listops" / "1.0.0" / "dataset_info.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"cannot read .*dataset_info\.json"):
        open_split("listops", "train", str(data_dir))


def test_a_data_set_of_another_kind_is_named(data_dir):
    with pytest.raises(UserError, match=r"'listops' has no 'text' but label, tokens: it is not one for this task"):
        open_split("listops", "train", str(data_dir), ("text", "label"))


def test_a_split_without_examples_is_named(data_dir):
    info = json.loads((shard(data_dir).parent / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["0"]
    edit_info(data_dir, splits=info["splits"])
    with pytest.raises(UserError, match=r"1\.0\.0: the train split has no examples"):
        open_split("listops", "train", str(data_dir))


@pytest.mark.parametrize("name", ["", "/etc", "../listops", "listops/../listops", "a\0b", "list ops", "listops/"])
def test_a_name_that_no_data_set_has_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="expected a name, or name/config"):
        open_split(name, "train", str(tmp_path))


@pytest.mark.parametrize("place", ["gs://bucket", "~nosuchuser/data"])
def test_a_place_that_cannot_be_is_named(place, monkeypatch):
    with pytest.raises(UserError, match=r"^data_dir="):
        data_directory(place)
    monkeypatch.setenv("TFDS_DATA_DIR", place)
    with pytest.raises(UserError, match=r"^TFDS_DATA_DIR="):
        data_directory(None)


@pytest.mark.parametrize(("name", "scale"), [("listops/0.001", "0.001"), ("listops/3e-05", "3e-05")])
def test_a_missing_part_comes_with_its_command(tmp_path, name, scale):
    with pytest.raises(UserError, match=f"--dataset=listops --scale={scale} "):
        open_split(name, "train", str(tmp_path))


def test_what_identifies_a_split_is_its_content(data_dir, tmp_path):
    fingerprint = lambda place, split="train": open_split("listops", split, str(place)).fingerprint
    found = fingerprint(data_dir)
    assert list(found) == ["listops 1.0.0 train"]
    assert found["listops 1.0.0 train"].startswith("3,000 examples, sha256 ")
    assert found == fingerprint(shutil.copytree(data_dir, tmp_path / "other place"))
    few = {"train": 300, "validation": 10, "test": 10}
    other = dataclasses.replace(PARAMETERS, max_arguments=4)
    for name, parameters in (("one", PARAMETERS), ("same", PARAMETERS), ("other", other)):
        preparation.prepare(ListOps(data_dir=tmp_path / name, sizes=few, parameters=parameters))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "same")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")
    # Other contents under the same description.
    for path in (tmp_path / "other").rglob("*.json"):
        shutil.copy(tmp_path / "one" / path.relative_to(tmp_path / "other"), path)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")


def test_damage_inside_a_file_is_named_when_it_is_met(data_dir):
    with shard(data_dir).open("r+b") as file:
        file.seek(shard(data_dir).stat().st_size // 2)
        file.write(bytes(4000))
    source = open_split("listops", "train", str(data_dir))
    with pytest.raises(UserError, match=r"of split 'train' in .* is damaged"):
        _ = [source[index] for index in range(len(source))]


def test_where_data_are_looked_for(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert data_directory(None) == Path.home() / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "/elsewhere")
    assert data_directory(None) == Path("/elsewhere")
    assert data_directory("~/mine") == Path.home() / "mine"


@pytest.mark.parametrize("name", OWN_DATASETS)
def test_every_builder_has_its_files_name(name):
    assert preparation.builder_class(name).name == name
    assert issubclass(preparation.builder_class(name), preparation.ArrayRecordBuilder)


@pytest.mark.breadth  # test_a_name_that_is_none_comes_with_the_names_there_are
def test_the_program_names_what_it_can_make(tmp_path):
    command = [sys.executable, "-m", "experiments.prepare", f"--data_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert f"--dataset can be: {', '.join(OWN_DATASETS)}" in done.stderr


def test_a_name_that_is_none_comes_with_the_names_there_are(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"--dataset can be: {', '.join(OWN_DATASETS)}")):
        builder(tmp_path, "listop")


def builder(data_dir: Path, dataset: str | None, scale: float = 1.0) -> Any:
    """That of the program's flags."""
    return preparation.make_builder(dataset, scale, data_dir=str(data_dir), manual_dir=None, processes=1)


@pytest.mark.parametrize("name", ["speech_commands", "pathfinder"])
def test_one_of_several_data_sets_is_named(tmp_path, name):
    known = ", ".join(f"{name}/{config.name}" for config in preparation.builder_class(name).BUILDER_CONFIGS)
    message = f"--dataset={name} has several configurations; choose one: {known}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        builder(tmp_path, name)


def test_a_data_set_of_one_configuration_needs_no_more_than_its_name(tmp_path):
    """It is looked for under the configuration's name: preparing stops at its missing source, and says the command."""
    command = f"then run: python -m experiments.prepare --dataset=imdb_reviews/plain_text --data_dir={tmp_path}"
    with pytest.raises(UserError, match=re.escape(command)):
        preparation.prepare(builder(tmp_path, "imdb_reviews"))


@pytest.mark.slow
def test_the_program_makes_listops(tmp_path):
    command = [sys.executable, "-m", "experiments.prepare", "--dataset=listops", f"--data_dir={tmp_path}"]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, timeout=500, check=True).stdout for _ in range(2)
    ]
    where = str(tmp_path / "listops" / "1.0.0")
    assert outputs[0].startswith(f"wrote {where} (")
    assert all(part in outputs[0] for part in ("train 96,000", "validation 2,000", "test 2,000"))
    assert outputs[1] == f"{where} already exists; nothing to do\n"
    for split, size in ListOps.SIZES.items():
        source = open_split("listops", split, str(tmp_path))
        assert len(source) == size
        tokens = source[0]["tokens"].tolist()
        assert listops.evaluate(tokens) == source[0]["label"]
