"""The study of explainers: the state that a rule names, its bars and table, and a tiny run of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs.lm import bytes as recipe
from experiments.common.errors import UserError
from experiments.evaluation.seeds import train_whole
from experiments.studies import explainers as study
from experiments.studies import explainers_text
from experiments.studies.dictionaries import Plan
from experiments.training.experiment import build
from seqboat.interp.predicates import Predicate, Rule
from tests.helpers import SMALL_MODEL

STATES = np.array([[-1, -1, 47, 47, 12, 12]] * 3)
EVEN = np.array([[0, 0, 1, 0, 0, 0]] * 3, bool)  # where the last digit of 47 is read
SYMBOL, PAIR = (lambda *numbers: Predicate("symbol", numbers)), (lambda *numbers: Predicate("pair", numbers))


@pytest.mark.parametrize(
    ("clauses", "active", "named"),
    [
        ([(PAIR(0, 6, 9),)], EVEN, True),
        ([(PAIR(0, 9, 6),)], EVEN, False),
        ([(SYMBOL(1, 6), SYMBOL(0, 9))], EVEN, True),
        ([(SYMBOL(1, 6),), (SYMBOL(0, 9),)], EVEN, False),  # either of them
        ([(SYMBOL(1, 6), SYMBOL(0, 8, 9))], EVEN, False),
        ([(SYMBOL(0, 3),), (Predicate("parity", (0,)), PAIR(0, 6, 9))], EVEN, True),
        ([(PAIR(0, 6, 9),)], np.roll(EVEN, 1, 1), False),  # one token later
        ([(PAIR(1, 6, 9),)], np.roll(EVEN, 1, 1), True),
        ([(PAIR(0, 3, 4),)], np.roll(EVEN, 2, 1), True),
        ([(PAIR(0, 6, 9),)], np.zeros_like(EVEN), False),
        ([(PAIR(0, 6, 9),)], np.roll(EVEN, -1, 1), False),  # before the first state
        ([], EVEN, False),
    ],
)
def test_the_state_that_a_rule_names(clauses, active, named):
    assert study.names_state(Rule(tuple(clauses)), active, STATES) is named


def test_units_are_drawn_from_those_that_fire(monkeypatch):
    monkeypatch.setattr(study, "LEAST_FIRES", 2)
    f = np.zeros((2, 3, 6))
    f[0, :2, [1, 4]], f[:, 0, 3], f[0, 0, 5] = 1, 1, 1
    assert sorted(study.chosen(f, 0)) == [1, 3, 4]
    monkeypatch.setattr(study, "UNITS", 2)
    assert study.chosen(f, 0) == study.chosen(f, 0)
    assert len(study.chosen(f, 0)) == 2


def test_what_needs_no_words():
    f = np.zeros((2, 20, 3))
    f[0, 3, 0], f[:, [2, 18], 1], f[1, 19, 2] = 1, 1, 1  # in one of four windows of 16, in all, in what is not shown
    shown = np.ones((2, 20), bool)
    np.testing.assert_allclose(study.unselective(f, shown), [0.4, 1, 0.4])
    shown[1, 16:] = False
    np.testing.assert_allclose(study.unselective(f, shown), [0.5, 1, 0])


def row(seed, arm, simulation, f1, named=None):
    scores = dict.fromkeys(study.COLUMNS, 0.5) | {"simulation": simulation, "f1": f1, "intervention": None}
    return {"seed": seed, "arm": arm, "scores": scores, "named": named, "failed": 1}


def test_the_worst_seed_meets_a_bar_or_does_not_and_is_in_the_table():
    rows = [row(10, "dictionary", 0.8, 0.7, 0.9), row(10, "channels", 0.6, 0.6)]
    assert study.bars(rows) == [], "an arm is missing"
    rows += [row(10, "directions", 0.7, 0.8), row(11, "dictionary", 0.8, 0.7, None)]
    rows += [row(11, "channels", None, 0.5), row(11, "directions", 0.7, 0.6)]
    found = [(round(bar["value"], 2), bar["met"]) for bar in study.bars(rows)]
    assert found == [(0.2, True), (0.1, False), (0.1, True), (-0.1, False), (0.0, False)]
    table = study.section({"rows": rows})
    assert "| dictionary | 0.80 (0.80 to 0.80) | 0.70 (0.70 to 0.70) |" in table
    assert "| channels | 0.60 (0.60 to 0.60) | 0.55 (0.50 to 0.60) |" in table
    assert table.count("|  | 2 |") == 3, "nothing was taken away, and two answers failed"


@pytest.mark.slow
def test_a_tiny_study_of_explainers(tmp_path, monkeypatch):
    for name, value in {"BATCHES": 1, "UNITS": 4, "EDITED": 3, "LEAST_FIRES": 4, "SHOWN": 2}.items():
        monkeypatch.setattr(study, name, value)
    sizes = {"task.test_examples": 128, "task.states": 12, "task.edges": 2, "task.length": 16, "train.steps": 2}
    few = {"train.steps": 2, "train.batch_size": 64, "task.chunk": 1, "task.evaluation_batches": 1}
    few |= {"model.k": 2, "optimizer.warmup_steps": 1, "model.auxiliary_k": 2}
    plan = Plan(
        seeds=(3,),
        model={**SMALL_MODEL, **sizes, "optimizer.warmup_steps": 1},
        dictionary=few,
        sites={"m": 24},
        layers=(2,),
    )
    saved = []
    checked = study.run(plan, tmp_path, lambda result: saved.append(json.dumps(result)))
    result = json.loads(saved[-1])
    assert result["bars"] == json.loads(json.dumps(checked))
    assert len(checked) == 5
    assert [row["arm"] for row in result["rows"]] == ["dictionary", "channels", "directions"]
    for row in result["rows"]:
        assert row["l0"] <= 2
        assert row["failed"] == 0
        assert 1 <= row["units"] <= 4
        assert -1 <= row["scores"]["simulation"] <= 1
        assert all(row["scores"][name] is None or 0 <= row["scores"][name] <= 1 for name in ("f1", "detection"))
        assert row["examples"][0]["text"]
    assert "| directions |" in study.section(result)


@pytest.mark.slow
def test_a_unit_that_is_taken_away_changes_what_follows(tmp_path, monkeypatch):
    """Its effect is zero where the atom is."""
    monkeypatch.setattr(study, "BATCHES", 1)
    plan = Plan(seeds=(3,), model={**SMALL_MODEL, "task.length": 16, "task.test_examples": 64, "train.steps": 0})
    model = study.dictionaries.model(plan, 3, tmp_path, True)
    found = study.see(model, 2, 3)
    atoms = study.arms(study.dictionaries.largest_channels(found.m.reshape(-1, 8), 2), found)["channels"]
    f = np.asarray(atoms.encode(jnp.asarray(found.m)))
    effects = study.removed(model, 2, atoms, f, [0, 1], found)
    assert effects.shape == (2, 2, 12)
    assert np.abs(effects).max() > 1e-4
    nothing = atoms.replace(decoder=0 * atoms.decoder)
    np.testing.assert_allclose(study.removed(model, 2, nothing, f, [0, 1], found), 0 * effects, atol=1e-6)


def test_words_of_a_text_are_shown_as_they_are():
    scores = dict.fromkeys(study.COLUMNS, 0.5) | {"intervention": None}
    shown = {"unit": 7, "text": "the last symbol is `|`", "detection_f1": 0.875, "f1": 0.25, "simulation": None}
    row = {"arm": "dictionary", "units": 9, "alive": 12, "size": 16, "l0": 2.04, "well_said": 1 / 3, "said_of_all": 0.1}
    table = explainers_text.section({"rows": [{**row, "scores": scores, "examples": [shown] * 12}]})
    assert "| dictionary | 9 | 12 of 16 | 2.0 | 0.33 | 0.10 | 0.50 | 0.50 |" in table
    assert table.count("| 7 | `the last symbol is '\\|'` | 0.88 | 0.25 |  |") == explainers_text.SHOWN


@pytest.mark.slow
def test_a_tiny_study_of_a_text(tmp_path, monkeypatch):
    """Halves share no bytes, though windows of evaluation do."""
    for name, value in {"UNITS": 4, "EDITED": 2, "LEAST_FIRES": 1}.items():
        monkeypatch.setattr(study, name, value)
    for name, value in {"FEATURES": 32, "FEATURES_A_TOKEN": 2, "BATCHES": 4}.items():
        monkeypatch.setattr(explainers_text, name, value)
    with pytest.raises(UserError, match="model"):
        explainers_text.study(print, workdir=tmp_path)
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 40_000).tolist()))
    config = recipe.get_config("tiny")
    sizes = {"task.length": 32, "task.context": 16, "task.evaluation_bytes": None}
    steps = {"train.steps": 1, "train.batch_size": 4}
    config.update_from_flattened_dict({**SMALL_MODEL, "task.files": (str(text),), **sizes, **steps})
    train_whole(build(config.to_dict()), tmp_path / "model", "model")
    model = explainers_text.load(tmp_path / "model")
    parts = explainers_text.see(model, 0).parts
    windows = [contexts.tokens for contexts in (parts.made, parts.scored)]
    assert all(tokens.shape == (4, 32) for tokens in windows)
    pieces = [{tuple(row[at : at + 8].tolist()) for row in tokens for at in range(25)} for tokens in windows]
    assert not pieces[0] & pieces[1]
    saved = []
    explainers_text.study(lambda result: saved.append(json.dumps(result)), workdir=tmp_path)
    result = json.loads(saved[-1])
    assert [row["arm"] for row in result["rows"]] == ["dictionary", "channels", "directions"]
    assert all(0 <= row["well_said"] <= 1 for row in result["rows"])
    assert explainers_text.section(result).count("| directions |") == 1
