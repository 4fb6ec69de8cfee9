"""Units in words: which answers an intervention counts, and what a method asks its judge about."""

import numpy as np
import pytest

from experiments.evaluation import explanations
from experiments.evaluation.explanations import PREDICATES, explained, halves
from seqboat.interp.explainers import Contexts, split

ACTIVE = np.array([[[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]], bool)  # one unit, four sequences


@pytest.mark.parametrize(
    ("each", "documents", "first", "second"),
    [
        (True, 1, [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]], np.zeros((4, 3))),
        (False, 1, [1, 0, 1, 0], [0, 0, 0, 0]),
        (False, 2, [1, 0], [0, 1]),  # pairs: the third sequence is of the second example
    ],
)
def test_answers_where_a_unit_fires(each, documents, first, second):
    found = explanations._where(ACTIVE, each, documents)
    np.testing.assert_array_equal(found[0, 0], first)
    np.testing.assert_array_equal(found[0, 1], second)


class Counting:
    """A judge that is always right, and remembers how many elements it was asked about."""

    def __init__(self):
        self.asked = []

    def judge(self, explanation, contexts):
        self.asked.append(contexts.shown.sum(1).tolist())
        return (contexts.tokens == 2).astype(float)


def test_a_method_asks_about_few_windows():
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((12, 50)) < 0.05, 2, 1)
    lengths = np.tile([50, 20], 6)
    contexts = Contexts(tokens, str, np.arange(50) < lengths[:, None])
    activations = 1.0 * ((tokens == 2) & contexts.shown)
    parts = halves(contexts, split(12, 0))
    assert (len(parts.made.tokens), len(parts.scored.tokens)) == (6, 6)
    judge = Counting()
    method = PREDICATES._replace(judge=judge, windows=3, windowed=True)
    (found,) = explained(method, parts, [(7, activations, None)], 0)
    assert (found.unit, found.explanation.text) == (7, "the symbol is 2")
    assert all(0 < number <= explanations.WIDTH for asked in judge.asked for number in asked)
    assert len(judge.asked[0]) == 6, "one window of every sequence"
    assert found.simulation.asked == sum(judge.asked[0])
    assert all(len(asked) <= 3 for asked in judge.asked[1:])
    assert found.asked == found.simulation.asked + sum(each.asked for each in (*found.detection, found.fuzzing))
    scores = found.scores()
    assert (scores["detection"], found.failed) == (1, 0)
    assert scores["detection_near"] is None, "nothing determines it"
    judge.asked.clear()
    (whole,) = explained(method._replace(windowed=False), parts, [(7, activations, activations)], 0)
    assert whole.simulation.asked == parts.scored.shown.sum()
