"""Studies: what they say of runs, a tiny run of each, and that the page in the docs is the one their files make."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.hyper import rotation
from experiments.common.errors import UserError
from experiments.pages import hypernetworks as page
from experiments.studies import arms, continual, reach

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_its_files_make(tmp_path):
    for path in (DOCS / "_data/hypernetworks").iterdir():
        if path.suffix != ".png":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert (DOCS / "hypernetworks.md").read_text() == page.page(tmp_path), "run python -m experiments.pages.results"
    drawn, kept = ({path.name for path in folder.glob("*.png")} for folder in (tmp_path, DOCS / "_data/hypernetworks"))
    assert drawn == kept


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "rotation.json").write_text(json.dumps({"arms": {"mip": {}}}))
    with pytest.raises(UserError, match=r"rotation\.json is not a file of experiments\.study"):
        page.page(tmp_path)


def test_an_arm_is_told_by_its_best_rate():
    loss = np.array([[[2.0, 0.3], [1.0, 0.1]], [[0.5, 0.19], [0.2, 0.25]], [[9.0, np.nan], [9.0, 0.15]]])
    runs = {
        "loss": loss,
        "steps": np.array([50, 100]),
        "test": np.ones((3, 2)),
        "variation": np.ones((3, 2, 2)),
    }
    found = arms.summary(runs, (0.1, 0.2, 0.3))
    # Medians of the last losses: 0.2, 0.22, infinite.
    assert found["rate"] == 0.1
    np.testing.assert_allclose(found["loss"], [0.2, 0.1, 0.3])
    assert found["reached"]["0.25"] == [None, 100]
    assert found["reached"]["0.4"] == [100, 100]
    assert found["rates_within_1.5"] == 2
    assert found["diverged"] == 1


def test_forgetting_is_what_was_learned_less_what_is_left():
    matrix = np.zeros((1, 3, 3))
    matrix[0] = [[0.9, 0.1, 0.1], [0.7, 0.8, 0.2], [0.6, 0.5, 1.0]]
    found = continual.summary(matrix)
    np.testing.assert_allclose(found["learned"], 0.9)
    np.testing.assert_allclose(found["last"], 0.7)
    np.testing.assert_allclose(found["forgetting"], 0.3)


def test_tasks_of_digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    split, permuted = continual.sequence("split", 0), continual.sequence("permuted", 0)
    assert split["train"]["x"].shape == (5, 260, 64)
    assert split["test"]["y"].shape == (5, 90)
    assert set(np.unique(split["train"]["y"])) == {0, 1}
    first, second = permuted["train"]["x"][:2]
    np.testing.assert_array_equal(np.sort(first, 1), np.sort(second, 1))
    assert np.any(first != second)
    assert np.any(permuted["train"]["x"] != continual.sequence("permuted", 1)["train"]["x"])


@pytest.mark.slow
def test_one_tiny_run_of_each():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    values = rotation.get_config("mip").to_dict()
    values["train"]["steps"] = 2
    runs = arms.run(values, (0.01, 0.1), range(2))
    assert runs["loss"].shape == (2, 2, 1)
    assert np.isfinite(runs["loss"]).all()
    assert runs["variation"].shape == (2, 2, 2)
    matrix = np.asarray(continual.run("split", "recurrent", 1.0, "importance", range(2), 2))
    assert matrix.shape == (2, 5, 5)
    assert ((matrix >= 0) & (matrix <= 1)).all()


def test_the_study_of_reach_is_a_table_of_slopes(monkeypatch):
    monkeypatch.setattr(reach, "ARMS", {"elman": reach.ARMS["elman"]})
    saved = []
    reach.study(range(2), {"command": "c"}, saved.append)
    spread = saved[-1]["elman"]["metrics"]["slope"]
    assert len(spread["values"]) == 2
    assert all(-0.9 < slope < -0.6 for slope in spread["values"])
    assert spread["values"][0] != spread["values"][1]
    assert spread["standard_error"] > 0
