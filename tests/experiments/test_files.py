"""Paths that users give: what a file system takes is a path, the rest is one line."""

import os
from pathlib import Path

import pytest

from experiments.common.errors import UserError
from experiments.common.files import user_path


@pytest.mark.parametrize(
    "name", ["a b", "x[1]", "x*", "x?", "{a,b}", "'q'", '"', "é", "a:b", "a/../b", ".", "n/gs://x", "x" * 255, "a\nb"]
)
def test_what_a_file_system_takes(name):
    assert user_path(name, "--workdir") == Path(name)
    assert user_path(Path(name), "--workdir") == Path(name)
    assert user_path(f"{name}/", "--workdir") == Path(name)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~", "--workdir") == tmp_path
    assert user_path(Path("~/runs/x"), "--workdir") == tmp_path / "runs/x"
    assert user_path("runs/~", "--workdir") == Path("runs/~")


@pytest.mark.parametrize("name", ["./~x", "./gs:/x"])
def test_reading_twice_changes_nothing(name):
    once = user_path(name, "--workdir")
    assert once == Path.cwd() / name
    assert user_path(once, "workdir") == once


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "expected the path of a file or directory"),
        (None, "expected the path"),
        (3, "expected the path"),
        ("a\0b", "without NUL"),
        ("a\udcffb", "expected a path in UTF-8"),
        ("gs://bucket/x", "not a URL; mount the bucket with gcsfuse, one with a hierarchical namespace to train in"),
        ("S3://bucket/x", "not a URL; to read, mount the bucket with mount-s3; train on a file system that can rename"),
        ("file:///x", "not a URL; mount it"),
        ("file:/x", "not a URL"),
        (" https://host/x", "not a URL"),
        ("me@host:/x", "not a URL"),
        (Path("gs://bucket/x"), "not a URL"),
        ("~nosuchuser/x", "home directory is unknown"),
        ("x" * 256, "File name too long"),
        ("xy/" * 1500, "longer than 3800 bytes"),
        (f"{os.path.relpath(__file__)}/x", "Not a directory"),
    ],
)
def test_what_is_refused(value, problem):
    with pytest.raises(UserError, match=rf"^--workdir=[^\n]*{problem}[^\n]*$"):
        user_path(value, "--workdir")


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        user_path(tmp_path / "a", "--workdir")


def test_no_home(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)  # what it does where there is none
    with pytest.raises(UserError, match=r"^data_dir=~/x: that user's home directory is unknown"):
        user_path("~/x", "data_dir")
