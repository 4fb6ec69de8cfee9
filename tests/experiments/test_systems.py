"""docs/systems.md: every line has a home and a command that exist, and evidence."""

import json
import re
from pathlib import Path

import pytest

from experiments.common.errors import UserError
from experiments.pages import systems

DOCS = Path(__file__).parents[2] / "docs"
LINES = json.loads((DOCS / "_data/systems/systems.json").read_text())


def test_the_page_is_what_its_file_makes():
    assert (DOCS / "systems.md").read_text() == systems.page(DOCS / "_data/systems"), (
        "run python -m experiments.pages.results"
    )


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["system"])
def test_a_command_names_programs_recipes_and_studies_that_exist(line):
    program = re.match(r"python -m ([\w.]+)", line["command"])
    assert program
    assert (DOCS.parent / f"{program[1].replace('.', '/')}.py").exists()
    named = re.search(r"--config=([\w/]+\.py)", line["command"]), re.search(r"--study=(\w+)", line["command"])
    config, study = (match and match[1] for match in named)
    assert config or study or program[1].startswith("examples.")
    assert not config or (DOCS.parent / config).exists()
    assert not study or (DOCS.parent / f"experiments/studies/{study}.py").exists()


def test_a_line_without_its_claim_is_refused(tmp_path):
    for folder in ("_data/systems", "_data/claims"):
        (tmp_path / "docs" / folder).mkdir(parents=True)
    (tmp_path / "home.py").touch()
    line = dict.fromkeys(systems.FIELDS, "x") | {"system": "S", "place": "home.py", "evidence": ["claims", "absent"]}
    path = tmp_path / "docs/_data/systems/systems.json"
    path.write_text(json.dumps([line]))
    with pytest.raises(UserError, match="'S': there is no claim absent"):
        systems.page(path.parent)
    path.write_text(json.dumps([line | {"paper": ""}]))
    with pytest.raises(UserError, match="'S' needs 'paper'"):
        systems.page(path.parent)
