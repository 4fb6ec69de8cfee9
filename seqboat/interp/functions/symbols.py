"""Functions of sequences of symbols: SEQUENCES, sequence to sequence, and UNITS, which fire at the elements where a
predicate of the context holds. Inputs are symbols (N, LENGTH), 0 to SYMBOLS - 1; answers have the same shape.

A template is a part of a table or two that are joined: "shift then reverse", "back and parity". In "back except first"
the unit does the opposite in all contexts with that first symbol: the corruption. Its numbers are those of its parts.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from seqboat.interp.functions.protocol import Description, Numbers, Score

SYMBOLS, LENGTH = 5, 12
NOTHING = -1  # where a sequence has ended
TESTS = 256  # inputs on which a description is scored
Apply = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """apply(x, *numbers), and the values of its numbers."""

    apply: Callable[..., np.ndarray]
    numbers: tuple[range, ...] = ()


def _shift(x: np.ndarray, lag: int, fill: int = NOTHING) -> np.ndarray:
    """x_{t - lag}, and `fill` where that is before the start."""
    return np.concatenate([np.full((len(x), lag), fill), x], 1)[:, : x.shape[1]]


def _dedupe(x: np.ndarray) -> np.ndarray:
    """The first of each run of the same symbol, then nothing."""
    kept = x != _shift(x, 1, NOTHING - 1)
    order = np.argsort(~kept, axis=1, kind="stable")
    packed = np.take_along_axis(x, order, 1)
    return np.where(np.arange(x.shape[1]) < kept.sum(1, keepdims=True), packed, NOTHING)


def _seen(x: np.ndarray) -> np.ndarray:
    return np.tril(x[:, :, None] == x[:, None, :], -1).any(2)


@dataclasses.dataclass(frozen=True)
class Table:
    """Parts by name, and joins: (first, second) -> one function."""

    parts: Mapping[str, Part]
    joins: Mapping[str, Callable[[Apply, Apply], Apply]]

    def split(self, template: str) -> list[str]:
        """[first, join, second], or [part]. Raises ValueError for another name."""
        for join in self.joins:
            first, found, second = template.partition(f" {join} ")
            if found and {first, second} <= set(self.parts):
                return [first, join, second]
        if template not in self.parts:
            joins = " and ".join(map(repr, self.joins))
            raise ValueError(f"template={template!r}: there are {', '.join(self.parts)}, joined by {joins}")
        return [template]

    def values(self, template: str, numbers: Numbers, x: np.ndarray) -> np.ndarray:
        """The answers to x (N, L), without noise. Raises ValueError for a name or numbers that the table lacks."""
        names = self.split(template)
        first, last = self.parts[names[0]], self.parts[names[-1]]
        ranges = first.numbers + (last.numbers if len(names) > 1 else ())
        if len(numbers) != len(ranges) or any(n not in r for n, r in zip(numbers, ranges, strict=True)):
            said = ", ".join(f"{r.start} to {r.stop - 1}" for r in ranges)
            raise ValueError(f"template={template!r}: numbers {numbers}, and it has {len(ranges)} ({said})")
        whole = [int(n) for n in numbers]
        count = len(first.numbers)
        of = lambda x: first.apply(x, *whole[:count])
        if len(names) == 1:
            return of(x)
        return self.joins[names[1]](of, lambda x: last.apply(x, *whole[count:]))(x)

    def answers(self, x: np.ndarray) -> Iterator[tuple[str, Numbers, np.ndarray]]:
        """What every candidate answers to x (N, L), with its name and numbers: every part with all its numbers, then
        every two of these by every join. The order of two matters only to joins that compose."""
        singles = [(name, n) for name, part in self.parts.items() for n in itertools.product(*part.numbers)]
        known = {(name, n): self.parts[name].apply(x, *n) for name, n in singles}
        of = lambda single: lambda z: known[single] if z is x else self.parts[single[0]].apply(z, *single[1])
        yield from ((*single, known[single]) for single in singles)
        for join, joined in self.joins.items():
            pairs = itertools.permutations if join == "then" else itertools.combinations
            for first, second in pairs(singles, 2):
                yield f"{first[0]} {join} {second[0]}", first[1] + second[1], joined(of(first), of(second))(x)


SEQUENCES = Table(
    {
        "reverse": Part(lambda x: x[:, ::-1]),
        "shift": Part(_shift, (range(1, 5),)),
        "dedupe": Part(_dedupe),
        "count": Part(lambda x, v: np.cumsum(x == v, 1), (range(SYMBOLS),)),
    },
    {"then": lambda first, second: lambda x: second(first(x))},
)
UNITS = Table(
    {
        "back": Part(lambda x, lag, v: _shift(x, lag) == v, (range(4), range(SYMBOLS))),
        "last two": Part(lambda x, u, v: (_shift(x, 1) == u) & (x == v), (range(SYMBOLS), range(SYMBOLS))),
        "below": Part(lambda x, v: x < v, (range(2, SYMBOLS),)),
        "parity": Part(lambda x, odd: np.broadcast_to(np.arange(x.shape[1]) % 2 == odd, x.shape), (range(2),)),
        "seen before": Part(_seen),
        "first": Part(lambda x, v: np.broadcast_to(x[:, :1] == v, x.shape), (range(SYMBOLS),)),
    },
    {
        "and": lambda first, second: lambda x: first(x) & second(x),
        "or": lambda first, second: lambda x: first(x) | second(x),
        "except": lambda first, second: lambda x: first(x) ^ second(x),
    },
)


def inputs(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random inputs (count, LENGTH)."""
    return rng.integers(SYMBOLS, size=(count, LENGTH))


@dataclasses.dataclass(frozen=True)
class SymbolFunction:
    """A template of a table. Of units, a share `noise` of the answers is inverted, the same ones at every call: they
    depend on `seed` and the whole input. Raises ValueError for a template that does not exist."""

    seed: int
    table: Table
    template: str
    numbers: Numbers
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.values(np.zeros((1, LENGTH), int))

    def values(self, x: np.ndarray) -> np.ndarray:
        """Without noise."""
        return self.table.values(self.template, self.numbers, x)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Answers (N, L) to x (N, L). Raises ValueError for other symbols."""
        if x.ndim != 2 or not ((x >= 0) & (x < SYMBOLS)).all():
            raise ValueError(f"query: x must be (N, L) symbols from 0 to {SYMBOLS - 1}")
        if not self.noise:
            return self.values(x)
        keys = [zlib.crc32(np.ascontiguousarray(row, np.int64).tobytes()) for row in x]
        draws = np.stack([np.random.default_rng((self.seed, key)).random(x.shape[1]) for key in keys])
        return self.values(x) ^ (draws < self.noise)

    def score(self, description: Description) -> Score:
        """Of sequences the share of inputs that are wholly right; of units the mean of the shares of right answers
        where they fire and where they do not, so that a constant has 0.5."""
        x = inputs(TESTS, np.random.default_rng((self.seed, 2)))
        truth, (*_, last) = self.values(x), self.table.split(self.template)
        if description.template is None:
            right = np.zeros(truth.shape, bool)
        else:
            right = self.table.values(description.template, description.numbers, x) == truth
        agreement = _balanced if truth.dtype == bool else lambda right, truth: float(right.all(1).mean())
        whole, named = agreement(right, truth), description.template == self.template
        if " except " not in self.template:
            return Score(whole, whole, None, named)
        corrupted = self.table.values(last, self.numbers[-len(self.table.parts[last].numbers) :], x)
        outside, inside = (_balanced(right[where], truth[where]) for where in (~corrupted, corrupted))
        return Score(whole, outside, inside, named)


def _balanced(right: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([right[truth == fires].mean() for fires in np.unique(truth)]))


def draw_sequence(seed: int, composed: bool = False) -> SymbolFunction:
    """A function of SEQUENCES from a seed: one part, or two different ones, the last of which may count."""
    rng = np.random.default_rng((seed, 1))
    names = [str(name) for name in rng.permutation(list(SEQUENCES.parts))[: 1 + composed]]
    names.sort(key=lambda name: name == "count")
    return SymbolFunction(seed, SEQUENCES, " then ".join(names), _draw_numbers(rng, SEQUENCES, names))


def draw_unit(seed: int, join: str | None = None, noise: float = 0.0) -> SymbolFunction:
    """A unit from a seed: one predicate, or two by "and", "or", "except", the last with contexts of one first symbol as
    the corruption. It fires at 5 to 95 % of the elements."""
    rng = np.random.default_rng((seed, 1))
    while True:
        names = [str(name) for name in rng.permutation([name for name in UNITS.parts if name != "first"])[:2]]
        names = [names[0], "first"] if join == "except" else names[: 2 if join else 1]
        names.sort(key=list(UNITS.parts).index)  # as the candidates are
        template = f" {join} ".join(names)
        unit = SymbolFunction(seed, UNITS, template, _draw_numbers(rng, UNITS, names), noise)
        if 0.05 <= unit.values(inputs(TESTS, rng)).mean() <= 0.95:
            return unit


def _draw_numbers(rng: np.random.Generator, table: Table, names: list[str]) -> Numbers:
    return tuple(int(rng.choice(values)) for name in names for values in table.parts[name].numbers)
