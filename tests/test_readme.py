"""The README's code runs, and its commands name what exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}  # the second uses what the first defines
    exec(blocks[0], names)
    assert names["y"].shape == (2, 100, 64)
    assert ((names["rates"] > 0) & (names["rates"] < 1)).all()
    exec(blocks[1], names)
    assert names["y"].shape == (4, 64)
    assert len(names["spec"].leaves) == 2


def test_commands_and_links_name_what_exists():
    for config in re.findall(r"--config=([\w/]+\.py)", TEXT):
        assert (ROOT / config).is_file(), config
    for program in re.findall(r"python -m (experiments\.\w+)", TEXT):
        assert (ROOT / (program.replace(".", "/") + ".py")).is_file(), program
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    targets = re.findall(r"^ +make ([\w-]+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_layout_names_every_folder():
    section = TEXT.split("## Repository layout\n")[1].split("\n\n")[1]
    named = {folder.rstrip("/") for folder in re.findall(r"^ {4}([\w/]+)", section, re.MULTILINE)}
    assert {"configs", "docs", "experiments", "launch", "tests"} <= named
    for folder in named:
        assert (ROOT / folder).is_dir(), folder
    for package in ("seqboat", "experiments"):
        for path in (ROOT / package).glob("*/__init__.py"):
            assert path.parent.relative_to(ROOT).as_posix() in named
