"""Explanations by predicates, and scores of explanations by any judge, on cases that are solved by hand. All numpy."""

import dataclasses

import numpy as np
import pytest

from seqboat.interp import scorers
from seqboat.interp.explainers import (
    Contexts,
    Explainer,
    Explanation,
    Judge,
    PredicateExplainer,
    Record,
    RuleJudge,
    split,
)
from seqboat.interp.functions import symbols
from seqboat.interp.predicates import KINDS, Predicate, Rule, Table, candidates

NAMES = "-abcdefghij".__getitem__
TOKENS = np.array([[1, 2, 1, 3, 1, 1], [2, 2, 3, 1, 2, 3]])
TABLE = Table(TOKENS, NAMES)
TEXT = Explanation("anything")


def holds(kind, *numbers, table=TABLE):
    return Predicate(kind, numbers).holds(table).astype(int).tolist()


def bits(*rows):
    return [[int(c) for c in row] for row in rows]


def say(kind, *numbers, symbol=NAMES):
    return Predicate(kind, numbers).say(symbol)


@pytest.mark.parametrize(
    ("predicate", "where", "words"),
    [
        (("symbol", 0, 1), ("101011", "000100"), "the symbol is a"),
        (("symbol", 1, 1, 3), ("010111", "000110"), "the symbol before is one of a c"),
        (("symbol", 3, 2), ("000010", "000110"), "the symbol 3 back is b"),
        (("pair", 0, 1, 2), ("010000", "000010"), "the last two symbols are a b"),
        (("pair", 1, 1, 2), ("001000", "000001"), "the two symbols before this one are a b"),
        (("pair", 2, 2, 3), ("000000", "000010"), "the two symbols before the last two are b c"),
        (("parity", 1), ("010101", "010101"), "the position, counted from 0, is odd"),
        (("start",), ("100000", "100000"), "it is the first position"),
        (("first", 2), ("000000", "111111"), "the first symbol of the sequence is b"),
        (("seen", 1), ("001011", "010011"), "the symbol has occurred before"),
        (("seen", 0), ("110100", "101100"), "the symbol occurs for the first time"),
        (("distance", 1), ("000001", "010000"), "the symbol has occurred in the token before"),
        (("distance", 2), ("001011", "010000"), "the symbol has occurred in the 2 tokens before"),
        (("followed", 3), ("000010", "000010"), "the last occurrence of the symbol was followed by c"),
        (("followed", 1), ("000001", "000001"), "the last occurrence of the symbol was followed by a"),
    ],
)
def test_where_a_predicate_holds_and_its_words(predicate, where, words):
    kind, *numbers = predicate
    assert holds(kind, *numbers) == bits(*where)
    assert say(kind, *numbers) == words
    assert kind in KINDS


def test_predicates_of_text():
    text = 'A (b1) "c <d> e'
    table = Table(np.array([[ord(c) for c in text]]), chr)
    assert {name: "".join(map(str, where[0].astype(int))) for name, where in table.classes.items()} == {
        "the symbol is a letter": "100100001001001",
        "the symbol is a digit": "000010000000000",
        "the symbol is an upper-case letter": "100000000000000",
        "the symbol is white space": "010000100100010",
        "the symbol is punctuation": "001001010010100",
        "it is the start of a word": "100100001001001",
        "it is inside brackets": "001110000000000",
        "it is inside quotes": "000000011111111",
        "it is inside a tag": "000000000011000",
    }
    names = [predicate.say(chr) for predicate in candidates(table, table.tokens == ord("b"), table.tokens > 0, 2)]
    assert "it is inside brackets" in names
    assert say("symbol", 0, 32, symbol=chr) == "the symbol is space"
    digits = Table(np.array([[3, 3]]), lambda number: f"{number} ")
    assert digits.classes == {}, "the same everywhere"
    assert holds("class", 1, table=digits) == [[0, 0]]


def test_a_rule_is_a_union_of_conjunctions():
    a, late, b = Predicate("symbol", (0, 1)), Predicate("seen", (1,)), Predicate("pair", (0, 2, 3))
    rule = Rule(((a, late), (b,)))
    assert rule.holds(TABLE).astype(int).tolist() == bits("001011", "001001")
    assert rule.say(NAMES) == "the symbol is a and the symbol has occurred before; or the last two symbols are b c"
    assert not Rule().holds(TABLE).any()
    assert Rule().say(NAMES) == ""


def test_a_set_of_symbols_can_be_read():
    """Of many symbols the eight that explain most, and of few those alone that help."""
    tokens = np.repeat(np.arange(1, 31), np.arange(1, 31))[None]
    sets = lambda positive: [
        numbers[1:]
        for kind, numbers in candidates(Table(tokens, str), positive, tokens > 0, 12)
        if kind == "symbol" and numbers[0] == 0 and len(numbers) > 2
    ]
    assert sets(tokens > 10) == [tuple(range(23, 31))]
    assert sets(np.isin(tokens, (3, 7, 9))) == [(3, 7, 9)]


def test_a_planted_rule_is_found_in_new_sequences():
    rng = np.random.default_rng(0)
    planted = Rule(
        (
            (Predicate("pair", (0, 4, 2)), Predicate("parity", (0,))),
            (Predicate("symbol", (2, 1)), Predicate("seen", (0,))),
        )
    )
    explainer, judge = PredicateExplainer(), RuleJudge()
    assert isinstance(explainer, Explainer)
    assert isinstance(judge, Judge)
    train, test = (Contexts(rng.integers(1, 9, (300, 16)), NAMES) for _ in range(2))
    record = lambda contexts: Record(contexts, planted.holds(contexts.table) * rng.uniform(1, 2, contexts.tokens.shape))
    found = explainer.explain(record(train))
    assert set(found.rule.clauses) == set(planted.clauses)
    assert found.text == found.rule.say(NAMES)
    assert explainer.explain(record(train)) == found, "deterministic"
    scored = scorers.simulation(judge, found, record(test))
    assert (scored.f1, scored.balanced_accuracy, scored.failed) == (1, 1, 0)
    assert scored.correlation > 0.9
    # Without the second clause, and with a noise that no rule explains.
    assert len(dataclasses.replace(explainer, rules=1).explain(record(train)).rule.clauses) == 1
    noise = Record(train, 1.0 * (rng.random(train.tokens.shape) < 0.05))
    assert len(explainer.explain(noise).rule.clauses) <= 3
    shown = Contexts(train.tokens, NAMES, np.arange(16) >= np.full((300, 1), 16))
    assert explainer.explain(Record(shown, record(train).activations)) == Explanation("it never fires", Rule())


@pytest.mark.parametrize("join", [None, "and", "or"])
def test_units_with_known_insides_are_explained(join):
    rng = np.random.default_rng(1)
    for seed in (2, 3):
        unit = symbols.draw_unit(seed, join)
        train, test = (Contexts(symbols.inputs(200, rng), str) for _ in range(2))
        found = PredicateExplainer().explain(Record(train, 1.0 * unit(train.tokens)))
        record = Record(test, 1.0 * unit(test.tokens))
        assert scorers.simulation(RuleJudge(), found, record).f1 == 1, (unit.template, found.text)


def test_of_many_elements_evenly_spaced_sequences_are_used(monkeypatch):
    tokens = np.where(np.arange(40)[:, None] % 2 == 0, 1, 2) * np.ones((1, 4), int)
    record = Record(Contexts(tokens, NAMES), 1.0 * (tokens == 2))
    assert PredicateExplainer().explain(record).text == "the symbol is b"
    monkeypatch.setattr("seqboat.interp.explainers.MOST_ELEMENTS", 80)
    assert PredicateExplainer().explain(record).text == "it never fires", "every other sequence"


class Fixed:
    """Probabilities by a function of the tokens."""

    def __init__(self, p):
        self.p = p

    def judge(self, explanation, contexts):
        return np.where(contexts.shown, self.p(contexts.tokens), np.nan)


def planted_record(seed=0, n=200):
    tokens = np.random.default_rng(seed).integers(1, 10, (n, 16))
    return Record(Contexts(tokens, NAMES), np.where(tokens == 2, 2.0, 0.0))


JUDGES = {
    "perfect": (lambda tokens: 1.0 * (tokens == 2), 1),
    "inverted": (lambda tokens: 1.0 * (tokens != 2), 0),
    "constant": (lambda tokens: np.full(tokens.shape, 0.7), 0.5),
}


@pytest.mark.parametrize("name", JUDGES)
def test_perfect_inverted_and_constant_judges(name):
    p, score = JUDGES[name]
    record = planted_record()
    near = 1.0 * (record.contexts.tokens == 3)
    found = scorers.detection(Fixed(p), TEXT, record, near, width=1)
    for each in (found.random, found.near, scorers.fuzzing(Fixed(p), TEXT, record, width=8)):
        assert (each.balanced_accuracy, each.auc, each.failed) == (score, score, 0)
        assert each.asked == 100
    whole = scorers.simulation(Fixed(p), TEXT, record)
    assert whole.balanced_accuracy == score
    assert whole.correlation == pytest.approx({1: 1, 0: -1, 0.5: 0}[score])
    assert whole.asked == record.contexts.tokens.size


def test_f1_is_that_at_the_natural_rate():
    record = planted_record(n=400)
    often = lambda tokens: 1.0 * (tokens <= 3)  # of three symbols one is right
    tokens = record.contexts.tokens
    rate, wrong = (tokens == 2).mean(), ((tokens <= 3) & (tokens != 2)).sum() / (tokens != 2).sum()
    exact = 2 * rate / (rate + (1 - rate) * wrong + rate)
    assert scorers.simulation(Fixed(often), TEXT, record).f1 == pytest.approx(exact)
    found = scorers.detection(Fixed(often), TEXT, record, width=1, count=600).random
    assert found.f1 == pytest.approx(exact, abs=0.03)
    assert found.balanced_accuracy == pytest.approx(1 - wrong / 2, abs=0.03), "which hides it"
    near = scorers.detection(Fixed(often), TEXT, record, 1.0 * (tokens == 3), width=1).near
    assert near.balanced_accuracy == 0.5, "what fires nearby is not told apart"
    assert near.f1 == pytest.approx(2 / 3)


def test_failed_answers_are_counted_and_left_out():
    record = planted_record()
    lost = lambda tokens: np.where(tokens == 5, np.nan, np.where(tokens == 6, 7.0, 1.0 * (tokens == 2)))
    whole = scorers.simulation(Fixed(lost), TEXT, record)
    assert whole.failed == np.isin(record.contexts.tokens, (5, 6)).sum()
    assert whole.f1 == 1
    found = scorers.detection(Fixed(lost), TEXT, record, width=1).random
    assert 0 < found.failed < 50
    assert found.balanced_accuracy == 1
    for judge in (RuleJudge(), Fixed(lambda tokens: np.full(tokens.shape, np.nan))):
        scores = (scorers.simulation(judge, TEXT, record), scorers.fuzzing(judge, TEXT, record))
        for each in (*scores, *scorers.detection(judge, TEXT, record)):
            assert each.failed == each.asked
            assert np.isnan(each.f1)


def test_a_feature_without_contexts_of_a_kind_has_no_score():
    p = Fixed(lambda tokens: 1.0 * (tokens == 2))
    tokens = planted_record().contexts.tokens
    for a in (np.zeros(tokens.shape), np.ones(tokens.shape)):
        record = Record(Contexts(tokens, NAMES), a)
        found = (scorers.detection(p, TEXT, record).random, scorers.fuzzing(p, TEXT, record))
        assert all(np.isnan(each.f1) and each.asked == 0 for each in found)
        assert np.isnan(scorers.simulation(p, TEXT, record).correlation)
    assert scorers.detection(p, TEXT, planted_record(), width=1).near.asked == 0


def test_elements_that_are_not_shown_do_not_count():
    tokens = planted_record().contexts.tokens
    contexts = Contexts(tokens, NAMES, np.arange(16) < np.full((200, 1), 11))
    record = Record(contexts, np.where((tokens == 2) | ~contexts.shown, 2.0, 0.0))
    assert scorers.simulation(Fixed(JUDGES["perfect"][0]), TEXT, record)[:3] == pytest.approx((1, 1, 1))
    found = scorers.detection(Fixed(JUDGES["perfect"][0]), TEXT, record, width=4)
    assert found.random.balanced_accuracy == 1
    assert scorers.fuzzing(Fixed(JUDGES["perfect"][0]), TEXT, record, width=4).balanced_accuracy == 1


def test_samples_are_those_of_their_seed():
    record, rough = planted_record(), Fixed(lambda tokens: (tokens * 7 % 10) / 10)
    of = lambda seed: scorers.detection(rough, TEXT, record, width=2, seed=seed)
    np.testing.assert_array_equal(of(1).random, of(1).random)
    assert of(1).random != of(2).random


def test_what_an_intervention_does_is_told_from_others():
    up, down = np.array([0.0, 1, 2, 3]), np.array([3.0, 2, 1, 0])
    np.testing.assert_allclose(scorers.intervention(np.array([[up, 10 * up], [down, down - 5]])), [2, 2])
    np.testing.assert_allclose(scorers.intervention(np.array([[up, up], [up, up]])), [0, 0], atol=1e-12)
    np.testing.assert_allclose(scorers.intervention(np.array([[up, down], [0 * up, up]])), [-2, 0], atol=1e-12)
    with pytest.raises(ValueError, match=r"effects: \(1, 2, 4\); expected \(F, 2, V\), of at least two"):
        scorers.intervention(np.array([[up, up]]))


def test_the_nearest_atom_is_another_one_that_lives():
    decoder = np.array([[1.0, 0], [2.0, 0.1], [0, 1.0], [1.0, 0.5]])
    assert scorers.nearest(decoder).tolist() == [1, 0, 3, 1]
    assert scorers.nearest(decoder, np.array([True, False, True, True])).tolist() == [3, 0, 3, 0]
    with pytest.raises(ValueError, match="nearest: 1 atoms are alive"):
        scorers.nearest(decoder, np.array([True, False, False, False]))


def test_sequences_are_split_before_anything_else():
    first = split(9, seed=1)
    assert (first.dtype, first.sum()) == (bool, 4)
    np.testing.assert_array_equal(split(9, seed=1), first)
    assert (split(9, seed=2) != first).any()
    assert split(2, 0, share=0.01).sum() == split(2, 0, share=0.99).sum() == 1
    with pytest.raises(ValueError, match=r"split: 1 sequences, share=0\.5; expected at least 2"):
        split(1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contexts(np.ones((2, 3)), NAMES), r"tokens: float64 \(2, 3\); expected symbols .* numbers cannot be"),
        (lambda: Contexts(np.array([[-1]]), NAMES), "tokens: int64"),
        (lambda: Contexts(np.ones(3, int), NAMES), r"tokens: int64 \(3,\)"),
        (lambda: Contexts(TOKENS, NAMES, TOKENS), r"shown: int64 \(2, 6\); expected booleans \(2, 6\)"),
        (lambda: Record(Contexts(TOKENS, NAMES), np.ones((2, 5))), r"activations: .* \(2, 5\); expected"),
        (lambda: Record(Contexts(TOKENS, NAMES), -1.0 * TOKENS), "activations: .* expected finite numbers >= 0"),
        (lambda: Record(Contexts(TOKENS, NAMES), TOKENS * np.nan), "activations: .* expected finite numbers >= 0"),
        (lambda: Record(Contexts(TOKENS, NAMES), TOKENS.astype(object)), "activations: object .* expected finite"),
        (lambda: PredicateExplainer(gain=np.nan), "gain=nan: expected a number of at least 0"),
        (lambda: PredicateExplainer(rules=0), "rules=0, most=12: expected at least 1"),
        (lambda: scorers.detection(RuleJudge(), TEXT, planted_record(), width=0), "width=0, count=50"),
        (lambda: scorers.fuzzing(RuleJudge(), TEXT, planted_record(), count=0), "width=16, count=0"),
        (lambda: scorers.simulation(Short(), TEXT, planted_record()), r"judge: answers of shape \(200, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Short:
    def judge(self, explanation, contexts):
        return np.ones((len(contexts.tokens), 1))
