"""The installed package: commands, files that are not Python, configs from anywhere; and hosted CI."""

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from experiments.common import cli
from tests.test_imports import PROGRAMS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_program_is_a_command():
    scripts = PROJECT["project"]["scripts"]
    assert set(scripts) == {f"seqboat-{name}" for name in PROGRAMS}
    assert set(scripts.values()) == {f"{cli.__name__}:{cli.console_script.__name__}"}


def test_a_command_is_the_program_of_its_name(monkeypatch):
    ran = []
    monkeypatch.setattr(sys, "argv", ["/usr/bin/seqboat-train", "--workdir=x"])
    monkeypatch.setattr("runpy.run_module", lambda name, **options: ran.append((name, options)))
    cli.console_script()
    assert ran == [("experiments.train", {"run_name": "__main__", "alter_sys": True})]


def test_files_that_are_not_python_are_packaged():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        path for name, globs in data.items() for glob in globs for path in (ROOT / name.replace(".", "/")).glob(glob)
    }
    found = {
        path for name in ("seqboat", "experiments", "configs") for path in (ROOT / name).rglob("*") if path.is_file()
    }
    others = {path for path in found if path.suffix not in (".py", ".pyc")}
    assert others == packaged
    assert {path.name for path in others} == {
        "report.html.j2",
        "frame.html.j2",
        "why.html.j2",
        "against.html.j2",
        "card.md.j2",
    }


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--config=configs/quickstart.py"], ["--config=ROOT/configs/quickstart.py"]),
        (["--config=configs/lra/text.py:tiny,full", "-x"], ["--config=ROOT/configs/lra/text.py:tiny,full", "-x"]),
        (["--config", "configs/quickstart.py"], ["--config", "ROOT/configs/quickstart.py"]),
        (["--config=configs/nothing.py"], ["--config=configs/nothing.py"]),
        (["--config=configs/own.py"], ["--config=configs/own.py"]),
        (["--workdir", "configs/quickstart.py"], ["--workdir", "configs/quickstart.py"]),
        (["--config"], ["--config"]),
    ],
)
def test_configs_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch, words, found):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/own.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli._with_packaged_config(["train", *words]) == ["train", *(w.replace("ROOT", str(ROOT)) for w in found)]


def test_a_config_here_comes_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["train", "--config=configs/quickstart.py"]
    assert cli._with_packaged_config(words) == words


def test_hosted_ci_runs_what_ci_runs():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    commands = "\n".join(step["run"] for step in jobs["wheel"]["steps"] if "run" in step)
    used = set(re.findall(r"seqboat-(?!\*)\w+", commands))
    assert used
    assert used <= set(PROJECT["project"]["scripts"])
