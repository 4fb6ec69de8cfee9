"""ListOps expressions with the distribution of the Long Range Arena (LRA: Tay et al. 2021, arXiv 2011.04006).

An expression is its pre-order token sequence, `[MAX 2 9 X` for MAX(2, 9): LRA's files without parentheses and with the
closing bracket written as X. Everything here is a pure function of parameters and a random stream.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from experiments.data import workers

# 0 is padding and 1 is out of vocabulary, as in LRA's TokenTextEncoder; neither is ever drawn.
VOCABULARY = ("<pad>", "<oov>", "[MIN", "[MAX", "[MED", "[SM", "X", *"0123456789")
VOCABULARY_SIZE = len(VOCABULARY)
MINIMUM, MAXIMUM, MEDIAN, SUM_MODULO = range(2, 6)
CLOSE = 6
ZERO = 7
CLASSES = 10

CHUNK = 250  # expressions per random stream: the unit of parallel work, about 0.2 s at LRA's lengths
_BLOCK = 1024  # nodes drawn at once; arbitrary, but changing it changes the data of a seed


@dataclass(frozen=True)
class ListOpsParameters:
    """Parameters of the generator; the defaults are LRA's. Both bounds of the length in tokens are strict.

    max_depth counts nodes from the root to a leaf. The number of arguments of an operator is uniform in
    min_arguments..max_arguments.
    """

    max_depth: int = 10
    max_arguments: int = 10
    min_arguments: int = 2
    operator_probability: float = 0.25
    min_length: int = 500
    max_length: int = 2000


Example = tuple[list[int], int]  # tokens, value


def generate(parameters: ListOpsParameters, rng: np.random.Generator) -> list[int]:
    """Draws trees until one has an allowed length, and returns its ids in pre-order, every operator closed by X.

    Each node above max_depth is an operator (min, max, median or sum modulo 10, uniformly) with probability
    operator_probability, otherwise a digit 0-9. Never returns if the parameters allow no tree of such a length.
    """
    nodes = _draw_nodes(parameters, rng)
    while True:
        if tokens := _grow(parameters, nodes):
            return tokens


def evaluate(tokens: Sequence[int]) -> int:
    """The value 0-9 of an expression. A median of an even count is the mean of the middle two, truncated, as in LRA.

    Raises ValueError if the tokens are not exactly one expression.
    """
    # The root's value ends up in the bottom list; above it, each open operator has a list of its argument values.
    operators: list[int] = []
    arguments: list[list[int]] = [[]]
    for token in tokens:
        if token >= ZERO:
            arguments[-1].append(token - ZERO)
        elif token == CLOSE and operators and arguments[-1]:
            value = _apply(operators.pop(), arguments.pop())
            arguments[-1].append(value)
        elif token in (MINIMUM, MAXIMUM, MEDIAN, SUM_MODULO):
            operators.append(token)
            arguments.append([])
        else:
            raise ValueError(f"not a ListOps expression: id {token} out of place")
    if operators or len(arguments[0]) != 1:
        raise ValueError(f"not one ListOps expression: {len(operators)} operators open, {len(arguments[0])} values")
    return arguments[0][0]


def render(tokens: Iterable[int]) -> str:
    """The expression as LRA's tokens."""
    return " ".join(VOCABULARY[token] for token in tokens)


def generate_chunk(parameters: ListOpsParameters, seed: int, split: int, chunk: int) -> list[Example]:
    """CHUNK labelled expressions: a pure function of its arguments, so chunks can be made in any order by any
    process."""
    rng = np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence([seed, split, chunk])))
    expressions = [generate(parameters, rng) for _ in range(CHUNK)]
    return [(tokens, evaluate(tokens)) for tokens in expressions]


def generate_split(
    parameters: ListOpsParameters, seed: int, split: int, size: int, seen: set[bytes], processes: int = 1
) -> Iterator[Example]:
    """Yields the first `size` expressions of a split, in chunk order, without those already in `seen`.

    `seen` holds digests and grows: pass the same set to successive splits and they share no expression. The result
    does not depend on `processes`. It never ends if the parameters allow fewer than `size` expressions.
    """
    if size == 0:
        return
    written = 0
    for chunk in workers.chunks(partial(generate_chunk, parameters, seed, split), processes):
        for tokens, value in chunk:
            digest = hashlib.blake2b(bytes(tokens), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
            yield tokens, value
            written += 1
            if written == size:
                return


def _draw_nodes(parameters: ListOpsParameters, rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """Yields independent nodes without end: (operator id or 0, number of arguments, digit id).

    The digit is used at max_depth, and for operator 0 at any depth.
    """
    while True:
        is_operator = rng.random(_BLOCK) <= parameters.operator_probability
        operators = rng.integers(MINIMUM, SUM_MODULO, _BLOCK, endpoint=True)
        arguments = rng.integers(parameters.min_arguments, parameters.max_arguments, _BLOCK, endpoint=True)
        digits = rng.integers(ZERO, ZERO + CLASSES, _BLOCK)
        yield from zip((operators * is_operator).tolist(), arguments.tolist(), digits.tolist(), strict=True)


def _grow(parameters: ListOpsParameters, nodes: Iterator[tuple[int, int, int]]) -> list[int]:
    """One tree in pre-order; empty if its length is not allowed, stopping as soon as it grows too long."""
    tokens: list[int] = []
    missing: list[int] = []  # remaining arguments of every open operator
    for operator, arguments, digit in nodes:
        if operator and len(missing) + 1 < parameters.max_depth:
            tokens.append(operator)
            missing.append(arguments)
        else:
            tokens.append(digit)
            while missing:
                missing[-1] -= 1
                if missing[-1]:
                    break
                missing.pop()
                tokens.append(CLOSE)
            if not missing:
                break
        if len(tokens) >= parameters.max_length:
            return []
    return tokens if parameters.min_length < len(tokens) < parameters.max_length else []


def _apply(operator: int, values: list[int]) -> int:
    """The value 0-9 of one operator applied to one or more values 0-9."""
    if operator == MINIMUM:
        return min(values)
    if operator == MAXIMUM:
        return max(values)
    if operator == SUM_MODULO:
        return sum(values) % CLASSES
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
