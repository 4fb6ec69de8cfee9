"""The notebooks: their code runs at tiny sizes, and each .ipynb is its .py, with the outputs of every cell."""

import json
import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
# What replaces the cell of parameters.
SIZES = {
    "a_hypernetwork_in_ten_lines": {"STEPS": 100},
    "look_inside_a_run": {"STEPS": 2},
    "the_layer": {"LONG": 256, "REPEATS": 1},
    "your_own_module": {"STEPS": 20},
}
MAX_BYTES = 300_000


def cells(notebook: Path) -> list[tuple[str, str]]:
    """(heading, text) of every cell of a script in percent format; Markdown without its comment signs."""
    _, *parts = re.split(r"^# %%", notebook.read_text(), flags=re.MULTILINE)
    found = [part.partition("\n")[::2] for part in parts]
    text = lambda heading, body: re.sub(r"^# ?", "", body, flags=re.MULTILINE) if "markdown" in heading else body
    return [(heading.strip(), text(heading, body).strip("\n")) for heading, body in found]


@pytest.mark.breadth  # tests/layers, tests/hyper, tests/test_readme.py: what they call
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_code_runs(notebook, tmp_path, monkeypatch):
    """The assertions of a notebook are its claims: each has some."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict = {}
    with jax.numpy_rank_promotion("allow"):  # as for a reader
        for heading, text in cells(notebook):
            if "markdown" not in heading:
                exec(compile(text, notebook.name, "exec"), names)
            if "parameters" in heading:
                assert SIZES[notebook.stem].keys() <= names.keys()
                names |= SIZES[notebook.stem]
    assert re.search(r"^assert ", notebook.read_text(), re.MULTILINE)
    assert plt.get_fignums()
    plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_pair_is_in_step(notebook):
    file = notebook.with_suffix(".ipynb")
    assert file.stat().st_size < MAX_BYTES
    made = json.loads(file.read_text())["cells"]
    assert [("".join(cell["source"]), cell["cell_type"]) for cell in made] == [
        (text, "markdown" if "markdown" in heading else "code") for heading, text in cells(notebook)
    ], "run make notebooks"
    code = [cell for cell in made if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs)


def test_there_are_four():
    assert {path.stem for path in NOTEBOOKS} == SIZES.keys()
