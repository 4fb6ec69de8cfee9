"""The code of the README and of docs/extending.md runs, and their commands, links and layout name what exists."""

import importlib.machinery
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np

from experiments.training.experiment import build

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_python_blocks_run():
    blocks = python_blocks(TEXT)
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
    section = TEXT.split("## Repository layout\n\n")[1].split("\n\n")[0]
    named = {folder.rstrip("/") for folder in re.findall(r"^ {4}([\w/]+)", section, re.MULTILINE)}
    assert {"configs", "docs", "experiments", "launch", "tests"} <= named
    for folder in named:
        assert (ROOT / folder).is_dir(), folder
    for package in ("seqboat", "experiments"):
        for path in (ROOT / package).glob("*/__init__.py"):
            assert path.parent.relative_to(ROOT).as_posix() in named


def test_the_recipes_of_extending_run(monkeypatch):
    module, mixer, task, config = python_blocks((ROOT / "docs/extending.md").read_text())
    names: dict = {}
    exec(module, names)
    assert 0 < names["stats"].active.sum() < names["stats"].elements
    np.testing.assert_allclose(names["y"], names["reference"], atol=1e-5)
    exec(mixer, names)
    np.testing.assert_allclose(names["pieces"], names["whole"], atol=1e-6)
    majority = types.ModuleType("experiments.tasks.majority")
    majority.__spec__ = importlib.machinery.ModuleSpec(majority.__name__, None)  # as if the block were a file
    monkeypatch.setitem(sys.modules, majority.__name__, majority)
    exec(task, vars(majority))
    exec(config, names)
    experiment = build(names["get_config"]().to_dict())
    batch = experiment.task.train_batch(0)
    np.testing.assert_array_equal(batch["targets"], 2 * (batch["inputs"] == 2).sum(1) > 15)
    assert 0.5 <= experiment.task.baseline("test")["accuracy"] < 0.6
    state = jax.eval_shape(experiment.steps.init, 0)
    assert jax.eval_shape(experiment.steps.train, state, batch).step.shape == ()


def test_the_guides_name_what_exists():
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:seqboat|experiments|configs|tests|launch)/[\w/]+(?:\.\w+)?)`", text):
            assert (ROOT / path).exists() or "NAME" in path, f"{page.name}: {path}"
        for module in re.findall(r"python -m ((?:experiments|tests)\.[\w.]+\w)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{page.name}: {module}"
