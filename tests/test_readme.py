"""The code of the README and of docs/extending.md runs; links, the clone URL, the numbers and the layout are right."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import experiments.tasks
from experiments.pages import figures
from experiments.training.experiment import build
from tests.helpers import plant

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_layer_in_ten_lines():
    (block,) = python_blocks(TEXT)
    assert len(block.splitlines()) <= 10
    names: dict = {}
    exec(block, names)
    assert names["y"].shape == (2, 100, 64)
    assert 0 < names["rate"] < 1


def test_links_and_targets_exist():
    assert len(TEXT.splitlines()) <= 120
    links = re.findall(r"\]\((?!http)([^)#]+)", TEXT) + re.findall(r'src="([^"]+)"', TEXT)
    for link in links:
        assert (ROOT / link).exists(), link
    targets = re.findall(r"(?:^ +|`)make ([\w-]+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_there_is_one_clone_url():
    """Whoever publishes the repository replaces OWNER in three files."""
    (url,) = re.findall(r'^repository-code: "(.*)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    for text in (TEXT, (ROOT / "docs/getting_started.md").read_text()):
        assert f"git clone {url} " in text
        assert f"pip install git+{url}`" in text


def test_the_numbers_are_those_of_the_figures():
    arms = [arm for file in figures.PICTURED.values() for arm in figures.arms(ROOT / "docs/_data/results" / file)]
    known = {f"{arm.mean:.3f} ± {arm.standard_error:.3f}" for arm in arms}
    quoted = re.findall(r"0\.\d{3} ± 0\.\d{3}", TEXT.replace("\n", " "))
    assert quoted
    assert set(quoted) <= known


def test_the_layout_names_every_folder():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Repository layout\n\n")[1].split("\n\n")[0]
    named = {folder.rstrip("/") for folder in re.findall(r"^ {4}([\w/]+)", section, re.MULTILINE)}
    assert {"configs", "docs", "experiments", "launch", "tests"} <= named
    for folder in named:
        assert (ROOT / folder).is_dir(), folder
    for package in ("seqboat", "experiments"):
        for path in (ROOT / package).glob("*/__init__.py"):
            assert path.parent.relative_to(ROOT).as_posix() in named


@pytest.mark.breadth  # test_docs.py runs the other blocks of the guides
def test_the_recipes_of_extending_run(monkeypatch, tmp_path):
    module, mixer, pieces, _, task, config, objective = python_blocks((ROOT / "docs/extending.md").read_text())
    names: dict = {}
    exec(module, names)
    assert 0 < names["stats"].active.sum() < names["stats"].elements
    np.testing.assert_allclose(names["y"], names["reference"], atol=1e-5)
    exec(mixer, names)
    exec(pieces, names)
    np.testing.assert_allclose(names["pieces"], names["whole"], atol=1e-6)
    plant(monkeypatch, tmp_path, experiments.tasks, "majority", task)
    exec(config, names)
    exec(objective, objectives := {})
    assert objectives["config"].objectives.guidance.run == "runs/guide"
    recipe = names["get_config"]()
    recipe.model.form = "dense"  # which is traced in half the time
    experiment = build(recipe.to_dict())
    batch = experiment.task.train_batch(0)
    np.testing.assert_array_equal(batch["targets"], 2 * (batch["inputs"] == 2).sum(1) > 15)
    assert 0.5 <= experiment.task.baseline("test")["accuracy"] < 0.6
    state = jax.eval_shape(experiment.functions.init, 0)
    assert jax.eval_shape(experiment.functions.train, state, batch, 0).step.shape == ()
