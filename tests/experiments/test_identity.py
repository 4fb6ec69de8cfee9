"""Which data a checkpoint was trained on: remembered, compared, and found again where it lies now."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.data.identity import changes, relocated, remember
from experiments.tasks import corpus, short_listops


def task(*files: str) -> corpus.Task:
    return corpus.Task(corpus.Config(files=files, length=8, context=0), batch_size=1, seed=0, data_dir=None)


@pytest.fixture
def text(tmp_path, monkeypatch) -> str:
    """A relative name, of a text in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"some text " * 30)
    return "texts/a.txt"


def test_the_same_bytes_are_the_same_data_wherever_they_lie(text, tmp_path):
    remembered = remember(task(text))
    assert remembered["directory"] == str(tmp_path)
    assert changes(remembered, task(str(tmp_path / text))) == []
    (tmp_path / "b").write_bytes(b"some text " * 30)
    assert changes(remembered, task("b")) == []


def test_what_changed_is_one_line_each(text, tmp_path):
    remembered = remember(task(text, text))
    (tmp_path / "b").write_bytes(b"some Text " * 30)
    (line,) = changes(remembered, task(text, "b"))
    assert line.startswith("config.task.files[1]: 300 bytes, sha256 ")
    assert " -> 300 bytes, sha256 " in line
    (line,) = changes(remembered, task(text))
    assert line.endswith(" -> none")


@pytest.mark.parametrize("remembered", [None, {}, [], {"fingerprint": None}, {"fingerprint": [1]}, "x"])
def test_a_checkpoint_that_remembers_nothing_is_not_compared(text, remembered):
    assert changes(remembered, task(text)) == []


def test_what_a_checkpoint_says_does_not_reach_the_terminal_raw():
    (line,) = changes({"fingerprint": {"\x1b[2J": ["\x07"]}}, SimpleNamespace(fingerprint={}))
    assert line.isprintable()


def test_generated_data_follow_from_the_config():
    few = short_listops.Task(short_listops.Config(4, 2, 2), batch_size=1, seed=0)
    assert remember(few) == {"fingerprint": {}}


def test_a_relative_file_is_found_from_elsewhere(text, tmp_path, monkeypatch):
    remembered, values = remember(task(text)), {"task": {"name": "corpus", "files": [text]}, "seed": 1}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert relocated(values, remembered, None) == {
        **values,
        "task": {"name": "corpus", "files": [str(tmp_path / text)]},
    }
    assert relocated(values, None, None) == values, "an old checkpoint: as it stands"
    (elsewhere / "a.txt").write_bytes(b"moved")
    found = relocated(values, remembered, str(elsewhere))["task"]["files"]
    assert found == [str(elsewhere / "a.txt")], "by its base name where data_dir says so"
    absolute = {"task": {"files": (str(tmp_path / text),)}}
    assert relocated(absolute, remembered, str(elsewhere))["task"]["files"] == found
    assert relocated(absolute, remembered, None)["task"]["files"] == [str(tmp_path / text)]


def test_a_relative_data_directory_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    values, remembered = {"data_dir": "data", "task": {}}, {"directory": str(tmp_path)}
    assert relocated(values, remembered, None)["data_dir"] == str(tmp_path / "data")
    assert relocated(values, remembered, "/moved")["data_dir"] == "/moved"
    assert relocated({**values, "data_dir": None}, remembered, None)["data_dir"] is None
    assert relocated({**values, "data_dir": "/there"}, remembered, None)["data_dir"] == "/there"


def test_other_configs_are_left_alone():
    for values in ({"task": {"name": "text"}}, {"task": 3}, {}, {"task": {"files": [3, ""]}}):
        assert relocated(values, {"directory": 3}, None) == values
    with pytest.raises(UserError, match="--data_dir=gs://"):
        relocated({"task": {"files": ["a"]}}, None, "gs://bucket")


def test_the_current_directory_may_be_gone(text, tmp_path, monkeypatch):
    found = task(text)
    monkeypatch.setattr(os, "getcwd", lambda: (_ for _ in ()).throw(FileNotFoundError))
    assert remember(found) == {"fingerprint": found.fingerprint}


def test_the_order_of_files_is_part_of_the_data(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).write_bytes(np.random.default_rng(seed).bytes(100))
    one, other = (task(*(str(tmp_path / name) for name in names)) for names in ("ab", "ba"))
    assert len(changes(remember(one), other)) == 2
