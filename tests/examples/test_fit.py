"""The loop that the examples share, their table, and that examples/README.md names each of them."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import _fit
from experiments.common.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))


def test_fit_takes_a_step_for_every_batch():
    """On (p - t)^2 / 2 at rate r a step is p <- p - r (p - t)."""
    run = lambda start: _fit.fit(lambda p, t: (p - t) ** 2 / 2, start, jnp.sqrt, optax.sgd(0.25), 3)
    params, losses = jax.jit(jax.vmap(run))(jnp.array([4.0, -1.0]))
    expected, found = np.array([4.0, -1.0]), []
    for step in range(3):
        found.append((expected - step**0.5) ** 2 / 2)
        expected = expected - 0.25 * (expected - step**0.5)
    np.testing.assert_allclose(params, expected, rtol=1e-6)
    np.testing.assert_allclose(losses, np.stack(found, 1), rtol=1e-6)


def test_a_table_has_what_a_claim_needs(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/examples/planted.py", "--seeds=2"])
    found = {"ours": {"error": jnp.array([1.0, 3.0]), "size": [2.0, 2.0]}, "control": {"error": [0.5, float("nan")]}}
    made = json.loads(json.dumps(_fit.table(found, range(2), steps=7)))
    assert made["ours"]["metrics"]["error"] | {"mean": 2.0, "standard_error": 1.0} == made["ours"]["metrics"]["error"]
    assert made["ours"]["test"] == [{"selection_metric": "error"}]
    assert made["ours"]["seeds"] == [0, 1]
    assert made["ours"]["command"] == "python -m examples.planted --seeds=2"
    assert made["ours"]["config"] == {"train": {"steps": 7}}
    assert {"hardware", "versions"} <= set(made["control"])
    assert made["control"]["metrics"]["error"]["values"] == [0.5, None]
    assert [_fit.shown(made[arm]["metrics"]["error"]) for arm in made] == ["2.000 ± 1.000", "-"]


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path):
    _fit.refuse(tmp_path / "x.json")
    with pytest.raises(UserError, match="is a directory"):
        _fit.refuse(tmp_path)
    with pytest.raises(UserError, match="could not write in"):
        _fit.refuse(tmp_path / "nothing/x.json")


def test_the_readme_names_every_example_with_its_command():
    text = (EXAMPLES / "README.md").read_text()
    assert sorted(set(re.findall(r"python -m examples\.(\w+)", text))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_gives_its_command(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.count("\n") <= 250
    assert f"python -m examples.{name}" in text
