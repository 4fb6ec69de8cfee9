"""ListOps: labels against an evaluator written another way, statistics, determinism."""

import hashlib

import numpy as np
import pytest
from scipy.signal import fftconvolve

from experiments.data import listops
from experiments.data.listops import ListOpsParameters, evaluate, generate, generate_chunk, generate_split, render

SMALL = ListOpsParameters(max_depth=4, max_arguments=5, min_length=7, max_length=60)


def parse(words: list[str]) -> int:
    """Consumes one expression from the front of its words and returns its value: recursive descent, numpy's median."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word)
    values = []
    while words[0] != "X":
        values.append(parse(words))
    words.pop(0)
    functions = {"[MIN": np.min, "[MAX": np.max, "[MED": lambda v: int(np.median(v)), "[SM": lambda v: np.sum(v) % 10}
    return int(functions[word](values))


def depth(tokens: list[int]) -> int:
    steps = [(token < listops.CLOSE) - (token == listops.CLOSE) for token in tokens]
    return int(np.cumsum(steps).max())


def draw(parameters: ListOpsParameters, count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [generate(parameters, rng) for _ in range(count)]


def check_labels(expressions: list[list[int]]) -> None:
    for tokens in expressions:
        words = render(tokens).split()
        assert parse(words) == evaluate(tokens), render(tokens)
        assert words == [], "one expression, and nothing after it"


def test_labels():
    check_labels(draw(SMALL, 400) + draw(ListOpsParameters(), 40))


@pytest.mark.slow
def test_labels_of_ten_thousand():
    check_labels(draw(ListOpsParameters(), 10_000))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 9 X", 2),
        ("[MAX 4 2 9 X", 9),
        ("[SM 4 2 9 X", 5),
        ("[MED 4 2 9 X", 4),
        ("[MED 1 4 X", 2),  # 2.5, truncated
        ("[MED 9 8 2 1 X", 5),
        ("[SM [MAX 1 2 X [MIN 3 4 X 9 X", 4),
    ],
)
def test_values_by_hand(words: str, value: int):
    assert evaluate([listops.VOCABULARY.index(word) for word in words.split()]) == value


@pytest.mark.parametrize("words", ["", "1 2", "X", "[MIN 1", "[MIN X", "[MIN 1 X X", "<pad>"])
def test_what_is_not_an_expression_is_rejected(words: str):
    with pytest.raises(ValueError, match="ListOps expression"):
        evaluate([listops.VOCABULARY.index(word) for word in words.split()])


def test_vocabulary_is_lra():
    assert listops.VOCABULARY_SIZE == 17
    assert [listops.VOCABULARY.index(word) for word in ("<pad>", "<oov>", "[MIN", "X", "0", "9")] == [0, 1, 2, 6, 7, 16]


@pytest.mark.parametrize("parameters", [SMALL, ListOpsParameters(3, 2, 2, 0.9, 2, 100), ListOpsParameters()])
def test_bounds(parameters: ListOpsParameters):
    expressions = draw(parameters, 50)
    assert all(parameters.min_length < len(tokens) < parameters.max_length for tokens in expressions)
    assert max(depth(tokens) for tokens in expressions) == parameters.max_depth - 1


def length_distribution(parameters: ListOpsParameters) -> np.ndarray:
    """The probability of each length, exactly: an expression has length 1, or 2 more than its arguments together.

    With f(z) the generating polynomial one level below and p the probability of an operator, a level has
    (1 - p) z + p z^2 mean_k f(z)^k, over the numbers k of arguments; what is beyond max_length is cut.
    """
    size = parameters.max_length
    digit = np.zeros(size)
    digit[1] = 1
    level = digit
    for _ in range(parameters.max_depth - 1):
        powers = [level]
        while len(powers) < parameters.max_arguments:
            powers.append(fftconvolve(powers[-1], level)[:size])
        arguments = np.mean(powers[parameters.min_arguments - 1 :], axis=0)
        level = (1 - parameters.operator_probability) * digit
        level[2:] += parameters.operator_probability * arguments[:-2]
    level[: parameters.min_length + 1] = 0
    return level / level.sum()


def check_lengths(examples: list[listops.Example], parameters: ListOpsParameters) -> None:
    """Mean and distribution function within 4 standard errors of the exact ones."""
    exact = length_distribution(parameters)
    values = np.arange(len(exact))
    lengths = np.array([len(tokens) for tokens, _ in examples])
    mean = exact @ values
    deviation = np.sqrt(exact @ (values - mean) ** 2)
    assert abs(lengths.mean() - mean) < 4 * deviation / np.sqrt(len(lengths))
    below = np.cumsum(exact)
    for quantile in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95):
        length = np.searchsorted(below, quantile)
        share = below[length]
        assert abs(np.mean(lengths <= length) - share) < 4 * np.sqrt(share * (1 - share) / len(lengths))


def check_statistics(examples: list[listops.Example]) -> None:
    """Labels and tokens within 4 standard errors (of both samples) of 4,000 expressions from LRA's own generator."""
    check_lengths(examples, ListOpsParameters())
    errors = 4 * np.sqrt(1 / len(examples) + 1 / 4000)
    values = np.bincount([value for _, value in examples], minlength=10) / len(examples)
    for value, reference in {0: 0.173, 1: 0.094, 9: 0.175}.items():
        assert abs(values[value] - reference) < errors * np.sqrt(reference * (1 - reference))
    assert np.all(np.abs(values[2:9] - 0.083) < 0.008 + errors * np.sqrt(0.083 * 0.917))  # 0.075 to 0.091

    shares = np.array([np.bincount(tokens, minlength=17) / len(tokens) for tokens, _ in examples])
    rounding = 0.001  # the reference shares have three decimals
    tolerance = rounding + errors * shares.std(axis=0)
    assert np.all(shares[:, :2] == 0)
    assert np.all(np.abs(shares[:, 2:6].mean(axis=0) - 0.035) < tolerance[2:6])
    assert abs(shares[:, listops.CLOSE].mean() - 0.142) < tolerance[listops.CLOSE]
    assert np.all(np.abs(shares[:, 7:].mean(axis=0) - 0.072) < tolerance[7:])
    assert {depth(tokens) for tokens, _ in examples} == {9}


@pytest.mark.parametrize(
    ("max_length", "expected"), [(6, [0, 1 / 2, 0, 0, 1 / 4, 1 / 4]), (5, [0, 2 / 3, 0, 0, 1 / 3])]
)
def test_the_exact_distribution_by_hand(max_length: int, expected: list[float]):
    # Half of the roots are digits, a quarter have two digits below them and a quarter three.
    parameters = ListOpsParameters(2, 3, 2, 0.5, 0, max_length)
    np.testing.assert_allclose(length_distribution(parameters), expected, atol=1e-12)


@pytest.mark.breadth  # test_lengths_of_short_expressions, test_a_node_is_an_operator_as_often_as_asked
def test_statistics_of_the_long_range_arena():
    check_statistics(list(generate_split(ListOpsParameters(), 0, 0, 1500, set())))


@pytest.mark.slow
def test_statistics_of_many():
    check_statistics(list(generate_split(ListOpsParameters(), 0, 0, 20_000, set(), processes=2)))


def test_lengths_of_short_expressions():
    check_lengths([(tokens, 0) for tokens in draw(SMALL, 10_000)], SMALL)


def test_a_node_is_an_operator_as_often_as_asked():
    # With no bound on the length, the first token is that of the root.
    roots = [tokens[0] for tokens in draw(ListOpsParameters(2, 3, 2, 0.25, 0, 10), 2000)]
    operators = np.array(roots) < listops.CLOSE
    assert abs(operators.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)


@pytest.mark.breadth  # test_sources.py: test_the_number_of_processes_changes_neither_examples_nor_order
def test_the_number_of_processes_changes_nothing():
    size = 2 * listops.CHUNK + 100
    alone = list(generate_split(SMALL, 3, 1, size, set()))
    together = list(generate_split(SMALL, 3, 1, size, set(), processes=3))
    assert len(alone) == size
    assert alone == together


def test_chunks_depend_on_seed_split_and_number():
    chunks = [generate_chunk(SMALL, *which) for which in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert generate_chunk(SMALL, 0, 0, 0) == chunks[0]
    assert all(chunks[i] != chunks[j] for i in range(4) for j in range(i))


def test_a_seed_means_the_same_data_for_ever():
    """A new release of numpy may change its streams; the prepared data then need a new version number."""
    tokens, value = generate_chunk(SMALL, seed=0, split=0, chunk=0)[0]
    assert (render(tokens), value) == ("[SM [MIN 5 [MAX 2 9 7 X 4 3 X 2 X", 5)
    expressions = [bytes(tokens) for tokens, _ in generate_chunk(ListOpsParameters(), seed=0, split=2, chunk=5)]
    assert hashlib.sha256(b"".join(expressions)).hexdigest() == (
        "104392fa5f83f365ca457253cdf333ca018e27d93489a487a4eced8259e31f36"
    )


def test_no_expression_appears_twice():
    tiny = ListOpsParameters(
        max_depth=2, max_arguments=3, min_length=3, max_length=5
    )  # 4 operators, 100 pairs of digits
    seen: set[bytes] = set()
    splits = [list(generate_split(tiny, 0, number, 150, seen)) for number in range(2)]
    expressions = [tuple(tokens) for split in splits for tokens, _ in split]
    assert len(set(expressions)) == len(expressions) == 300
    assert list(generate_split(tiny, 0, 2, 0, seen)) == []
