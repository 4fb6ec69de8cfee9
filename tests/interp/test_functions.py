"""Black boxes with known insides, interpreters of them, and how right a description is. All numpy."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import functions as study
from experiments.studies import functions_learned as learned
from experiments.studies.protocol import verdict
from experiments.tasks.symbol_function import Config
from seqboat.interp.functions import numeric, symbols
from seqboat.interp.functions.interpreters import Adaptive, Probing, Search, even, fit
from seqboat.interp.functions.numeric import FAMILIES, HIGH, LOW, NumericFunction
from seqboat.interp.functions.protocol import Description, Query, examine
from seqboat.interp.functions.symbols import SEQUENCES, UNITS, SymbolFunction

X = np.linspace(LOW, HIGH, 400)
# The steep line from 20 to 40 is 30 above the other.
CORRUPTED = NumericFunction(3, "linear except linear", (5.0, 1.0, 20.0, 40.0, 10.0, 31.0), noise=0.1)


def described(function):
    return Description("the truth", function.template, function.numbers)


def test_a_function_is_that_of_its_seed():
    drawn = lambda seed: numeric.draw(seed, corrupted=True)
    assert drawn(4) == drawn(4)
    assert drawn(4) != drawn(5)
    assert len({numeric.draw(seed).template for seed in range(40)}) == len(FAMILIES)
    assert symbols.draw_sequence(4, composed=True) == symbols.draw_sequence(4, composed=True)
    assert len({symbols.draw_unit(seed, "and").template for seed in range(20)}) > 5
    for seed in range(20):
        low, high = drawn(seed).interval
        assert LOW < low < high < HIGH
        assert 15 <= high - low <= 30
        assert 1 <= drawn(seed).noise / 0.05 <= 100


def test_noise_has_its_level_and_an_input_always_the_same_answer():
    for function in (CORRUPTED, numeric.draw(2, "sine", noise=0.2)):
        y = function(X)
        assert np.std(y - function.values(X)) == pytest.approx(function.noise, rel=0.1)
        np.testing.assert_array_equal(function(X[::-1])[::-1], y)
        np.testing.assert_array_equal(function(X[200:250]), y[200:250])  # also within the corruption, at 0.4 to 32
    assert CORRUPTED(np.array([0.0])) == CORRUPTED(np.array([-0.0]))
    other = dataclasses.replace(CORRUPTED, seed=4)
    assert (other(X) != CORRUPTED(X)).all()
    unit, x = symbols.draw_unit(3, noise=0.1), symbols.inputs(200, np.random.default_rng(0))
    assert (unit(x) != unit.values(x)).mean() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_array_equal(unit(x[50:60]), unit(x)[50:60])


def test_scores_of_the_truth_a_constant_its_opposite_and_no_answer():
    outer, mean = CORRUPTED.numbers[:2], float(CORRUPTED.values(X).mean())
    answers = {
        "truth": (described(CORRUPTED), (1, 1, 1, True)),
        "outside alone": (Description("", "linear", outer), (0, 1, 0, False)),
        "constant": (Description("", "linear", (0.0, mean)), (0, 0, 0, False)),
        "opposite": (Description("", "linear", (-5.0, 1.0)), (0, 0, 0, False)),
        "not finite": (Description("", "exponential", (1.0, 0.0, 0.0)), (0, 0, 0, False)),
        "none": (Description("I do not know"), (0, 0, 0, False)),
    }
    for name, (answer, score) in answers.items():
        assert CORRUPTED.score(answer) == score, name
    # The error is relative to the variance, so that an offset does not make a constant right.
    far = NumericFunction(0, "linear", (1.0, 1e4))
    assert far.nmse(Description("", "linear", (0.0, 1e4)))[0] == pytest.approx(1, rel=1e-3)
    assert far.score(described(far)) == (1, 1, None, True)

    unit = SymbolFunction(0, UNITS, "parity", (0,))
    assert unit.score(described(unit)) == (1, 1, None, True)
    assert unit.score(Description("", "back and back", (0, 1, 0, 2))) == (0.5, 0.5, None, False)  # never
    assert unit.score(Description("", "parity", (1,))) == (0, 0, None, True)
    assert unit.score(Description("I do not know")) == (0, 0, None, False)
    corrupted = SymbolFunction(0, UNITS, "parity except first", (0, 3))
    assert corrupted.score(described(unit))[1:] == (1, 0, False)
    sequence = SymbolFunction(0, SEQUENCES, "dedupe then shift", (1,))
    assert sequence.score(described(sequence)) == (1, 1, None, True)
    assert sequence.score(Description("", "dedupe"))[0] == 0


def test_what_functions_of_symbols_compute():
    x = np.array([[1, 1, 2, 2, 1]])
    of = lambda table, name, *numbers: (1 * table.values(name, numbers, x)).tolist()[0]
    assert of(SEQUENCES, "reverse") == [1, 2, 2, 1, 1]
    assert of(SEQUENCES, "shift", 2) == [-1, -1, 1, 1, 2]
    assert of(SEQUENCES, "dedupe") == [1, 2, 1, -1, -1]
    assert of(SEQUENCES, "count", 1) == [1, 2, 2, 2, 3]
    assert of(SEQUENCES, "shift then count", 1, 2) == [0, 0, 0, 1, 2]
    assert of(UNITS, "back", 2, 1) == [0, 0, 1, 1, 0]
    assert of(UNITS, "last two", 1, 2) == [0, 0, 1, 0, 0]
    assert of(UNITS, "below", 2) == [1, 1, 0, 0, 1]
    assert of(UNITS, "parity", 1) == [0, 1, 0, 1, 0]
    assert of(UNITS, "seen before") == [0, 1, 0, 1, 1]
    assert of(UNITS, "back or seen before", 0, 2) == [0, 1, 1, 1, 1]
    assert of(UNITS, "below except first", 2, 1) == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_found_exactly_without_noise(family):
    function = numeric.draw(21, family, noise=0.0)
    found, score = examine(function, Probing(points=even), 40)
    assert score == (1, 1, None, True)
    assert family in found.text
    # A step is known up to the distance of two points.
    assert function.nmse(found)[0] < (0.05 if family == "step" else 1e-6)


def test_a_fit_leaves_out_what_is_off_unless_the_noise_is_known():
    x = np.arange(20.0)
    y = 3 * x + np.where((x > 3) & (x < 8), 100.0, 0.0)
    robust = fit(x, y)
    assert (robust.family, *np.round(robust.numbers, 6)) == ("linear", 3 * HIGH, 0)
    np.testing.assert_array_equal(np.flatnonzero(robust.off(x, y)), [4, 5, 6, 7])
    assert fit(x, y, sigma=1.0).family != "linear"
    assert fit(x[:2], y[:2]).numbers == (0.0, 1.5)


def test_adaptive_probing_finds_the_corruption():
    found, score = examine(CORRUPTED, Adaptive(), 80)
    assert score == (1, 1, 1, True)
    np.testing.assert_allclose(found.numbers[2:4], (20, 40), atol=1)
    assert "linear(a=" in found.text
    once, score = examine(CORRUPTED, Probing(), 40)
    assert (once.template, score.outside, score.inside) == ("linear", 1, 0)


@pytest.mark.parametrize("table", [SEQUENCES, UNITS])
def test_the_search_finds_what_inputs_determine(table):
    function = symbols.draw_sequence(1, composed=True) if table is SEQUENCES else symbols.draw_unit(1, "except")
    found, score = examine(function, Search(table), 40)
    assert (found.template, found.numbers) == (function.template, function.numbers)
    assert score.overall == 1
    assert found.text.startswith(function.template)


@pytest.mark.breadth  # test_the_study_scores_every_interpreter
def test_the_budget_is_never_exceeded():
    asked = []
    query = Query(lambda x: asked.append(len(x)) or x, 5)
    query(np.zeros(3))
    with pytest.raises(ValueError, match=r"^query of 3 inputs: 2 of the budget of 5 are left$"):
        query(np.zeros(3))
    assert (asked, query.left) == ([3], 2)
    for budget in (1, 9):
        for interpreter in (Probing(), Probing(interval=True), Adaptive()):
            query = Query(CORRUPTED, budget)
            CORRUPTED.score(interpreter.interpret(query, budget))
            assert query.left == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Query(CORRUPTED, 0), "budget=0: it must be at least 1"),
        (lambda: numeric.draw(0, "cubic"), "family='cubic': there are linear, quadratic, absolute"),
        (lambda: numeric.values("cubic", (1, 2), X), "template='cubic': 'cubic' is not a family; there are linear"),
        (lambda: numeric.values("relu", (1, 2), X), "template='relu': 2 numbers, and it has 3 in 1 parts"),
        (
            lambda: NumericFunction(0, "linear except linear", (1, 2, 120, 140, 3, 4)),
            r"interval \(120, 140\): it must be within -128 and 128, the lower end first",
        ),
        (lambda: numeric.values("linear except linear", (1, 2, 9, 3, 3, 4), X), r"interval \(9, 3\): it must be"),
        (lambda: CORRUPTED(np.array([200.0])), "query: x must be within -128 and 128"),
        (lambda: SymbolFunction(0, UNITS, "back then first", ()), "template='back then first': there are back, last"),
        (
            lambda: SymbolFunction(0, UNITS, "back", (9, 1)),
            r"template='back': numbers \(9, 1\), and it has 2 \(",
        ),
        (lambda: symbols.draw_unit(0)(np.full((1, 4), 9)), r"query: x must be \(N, L\) symbols from 0 to 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(bad, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        bad()


def test_the_study_scores_every_interpreter():
    kinds = "numeric, corrupted", "sequences, composed", "units, corrupted"
    rows = [{"seed": 1, "kind": kind, **row} for kind in kinds for row in study.measure(kind, 1, 1)]
    assert len(rows) == 4 + 2
    assert all(0 <= row[field] <= 1 for row in rows for field in ("overall", "outside", "template"))
    assert [row["inside"] is None for row in rows] == ["corrupted" not in row["kind"] for row in rows]
    table = study.section({"rows": rows})
    assert "| units, corrupted | search | 1.00 (1.00 to 1.00) |" in table
    assert verdict(study.bars(rows)[1]).startswith("met: random probing inside: ")


def test_a_bar_is_judged_by_the_worst_seed():
    row = lambda name, outside, inside: {
        "kind": "numeric, corrupted",
        "interpreter": name,
        "outside": outside,
        "inside": inside,
    }
    rows = [row("random", 0.9, 0.1), row("adaptive", 1, 0.7), row("random", 0.8, 0.2), row("adaptive", 1, 0.4)]
    assert [(bar["value"], bar["met"]) for bar in study.bars(rows)] == [(0.8, False), (0.2, True), (0.2, False)]
    assert study.bars([]) == []


def test_a_model_that_learned_a_function_is_described_as_it():
    """A stand-in reverses its input, but keeps the input as it is where that begins with symbol 0 and ends with 1."""

    def apply(variables, inputs, lengths, train, mutable):
        given = inputs[:, :12]
        wrong = (given[:, :1] == 2) & (given[:, -1:] == 3)
        answers = jnp.where(wrong, given, given[:, ::-1])
        return SimpleNamespace(logits=jax.nn.one_hot(jnp.concatenate([0 * answers, answers], 1), 15)), {}

    run = SimpleNamespace(
        model=SimpleNamespace(apply=apply), variables={}, task=SimpleNamespace(config=Config(template="reverse"))
    )
    row = learned.measured(run, seed=0)
    assert 0.9 < row["wholly"] < row["elements"] < 1
    assert row["said of the model"] == row["said of the function"] == "reverse ()"
    assert row["model agrees"] == row["function agrees"] == 1
    shift = {**row, "function": "shift", "said of the model": "count (2)", "model agrees": 0.0}
    table = learned.section({"rows": [{**row, "function": "reverse"}, shift]}).splitlines()
    assert table[2].startswith("| reverse | 0.9")
    assert "| 1 of 1, 1.00 (1.00 to 1.00) |" in table[2]
    assert table[3].startswith("| shift (3) |")
    assert "| 0 of 1, 0.00 (0.00 to 0.00) |" in table[3]


@pytest.mark.breadth  # test_a_model_that_learned_a_function_is_described_as_it
def test_a_tiny_study_of_learned_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(learned, "FUNCTIONS", {"shift then reverse": (2,)})
    saved = []
    learned.study(lambda result: saved.append(json.dumps(result)), workdir=tmp_path, seeds=range(3, 4), steps=2)
    (row,) = json.loads(saved[-1])["rows"]
    assert row["function"] == "shift then reverse"
    assert 0 <= row["wholly"] <= row["elements"] <= 1
    assert row["function agrees"] == 1
    assert (tmp_path / "shift_then_reverse" / "seed_3" / "checkpoints").is_dir()
