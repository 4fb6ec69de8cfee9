"""Predicates of a token, from the symbols of its sequence up to it, and their words. All numpy.

`Table` holds what they are read from, `candidates` chooses those that may explain some elements, and a `Rule` is a
union of conjunctions of them. Predicates are numbers and a name of `KINDS`; nothing is executed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

LAGS = 4  # symbols back that a predicate may name, the symbol itself included
PAIRS = 3  # lags of the last symbol of a pair
LARGEST_SET = 8  # symbols that one predicate names, or nobody reads them
DISTANCES = (1, 2, 3, 4, 8, 16)  # to the last occurrence of the same symbol: at most
NOTHING = -1  # before the start

Elements = Bool[np.ndarray, "n L"]
Symbol = Callable[[int], str]


def plain_symbol(symbol: Symbol, number: int) -> str:
    """A symbol without the spaces around it; a space itself is named."""
    text = symbol(number)
    return text.strip() or ("space" if text else str(number))


def _character(text: str) -> str:
    """The one character of a symbol, also of one with a space beside it; "" for longer ones."""
    return text if len(text) == 1 else text.strip() if len(text.strip()) == 1 else ""


CLASSES: dict[str, Callable[[str], bool]] = {
    "a letter": str.isalpha,
    "a digit": str.isdigit,
    "an upper-case letter": str.isupper,
    "white space": str.isspace,
    "punctuation": lambda c: c.isprintable() and not c.isalnum() and not c.isspace(),
}
SURROUNDINGS = ("the start of a word", "inside brackets", "inside quotes", "inside a tag")


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What predicates are read from: `tokens` (n, L), symbols >= 0, of sequences that begin with their first element.
    Arrays are made when they are needed, once; the tokens must not change."""

    tokens: Int[np.ndarray, "n L"]
    symbol: Symbol

    @functools.cached_property
    def back(self) -> Int[np.ndarray, "lags n L"]:
        """The symbol 0, 1, .. tokens back, NOTHING before the start."""
        length = self.tokens.shape[1]
        padded = np.pad(self.tokens, ((0, 0), (LAGS - 1, 0)), constant_values=NOTHING)
        return np.stack([padded[:, LAGS - 1 - lag :][:, :length] for lag in range(LAGS)])

    @functools.cached_property
    def symbols(self) -> Int[np.ndarray, " V"]:
        """The symbols that occur."""
        return np.unique(self.tokens)

    @functools.cached_property
    def previous(self) -> Int[np.ndarray, "n L"]:
        """Where the same symbol was last, NOTHING if it was not."""
        order = np.argsort(self.tokens, axis=1, kind="stable")
        symbols = np.take_along_axis(self.tokens, order, 1)
        before = np.full(order.shape, NOTHING)
        before[:, 1:] = np.where(symbols[:, 1:] == symbols[:, :-1], order[:, :-1], NOTHING)
        found = np.empty_like(before)
        np.put_along_axis(found, order, before, 1)
        return found

    @functools.cached_property
    def distance(self) -> Int[np.ndarray, "n L"]:
        """How far back the same symbol was last, 0 if it was not."""
        return np.where(self.previous >= 0, np.arange(self.tokens.shape[1]) - self.previous, 0)

    @functools.cached_property
    def followed(self) -> Int[np.ndarray, "n L"]:
        """The symbol that followed the last occurrence of the same one, NOTHING without one."""
        after = np.take_along_axis(self.tokens, np.maximum(self.previous + 1, 0), 1)
        return np.where(self.previous >= 0, after, NOTHING)

    @functools.cached_property
    def classes(self) -> dict[str, Elements]:
        """Where the symbol is of a class of characters, and what is around it; classes that tell no elements apart are
        left out."""
        characters = [_character(self.symbol(number)) for number in self.symbols.tolist()]
        number = np.searchsorted(self.symbols, self.tokens)
        of = lambda test: np.array([bool(c) and test(c) for c in characters], bool)[number]
        found = {f"the symbol is {name}": of(test) for name, test in CLASSES.items()}
        letter = found["the symbol is a letter"]
        start = letter & ~np.pad(letter, ((0, 0), (1, 0)))[:, :-1]
        depth = np.cumsum(of(lambda c: c in "([{").astype(int) - of(lambda c: c in ")]}"), axis=1)
        quotes = np.cumsum(of(lambda c: c == '"'), axis=1) % 2 == 1
        around = (start, depth > 0, quotes, self._last(of(lambda c: c == "<")) > self._last(of(lambda c: c == ">")))
        found |= {f"it is {name}": where for name, where in zip(SURROUNDINGS, around, strict=True)}
        return {name: where for name, where in found.items() if where.any() and not where.all()}

    @staticmethod
    def _last(where: Elements) -> Int[np.ndarray, "n L"]:
        return np.maximum.accumulate(np.where(where, np.arange(where.shape[1]), NOTHING), axis=1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """apply(table, *numbers) are the elements (n, L) where it holds; say(word, *numbers) its words, where `word` is
    that of a symbol."""

    apply: Callable[..., Elements]
    say: Callable[..., str]


def _positions(table: Table) -> Int[np.ndarray, "n L"]:
    return np.broadcast_to(np.arange(table.tokens.shape[1]), table.tokens.shape)


def _say_symbol(word: Callable[[int], str], lag: int, *values: int) -> str:
    where = ("the symbol", "the symbol before", *(f"the symbol {n} back" for n in range(2, LAGS)))[lag]
    return f"{where} is {'one of ' if len(values) > 1 else ''}{' '.join(map(word, values))}"


def _say_pair(word: Callable[[int], str], lag: int, first: int, last: int) -> str:
    where = ("the last two symbols", "the two symbols before this one", "the two symbols before the last two")[lag]
    return f"{where} are {word(first)} {word(last)}"


_CLASSES = (*(f"the symbol is {name}" for name in CLASSES), *(f"it is {name}" for name in SURROUNDINGS))
KINDS: dict[str, Kind] = {
    "symbol": Kind(lambda table, lag, *values: np.isin(table.back[lag], values), _say_symbol),
    "pair": Kind(lambda table, lag, first, last: (table.back[lag + 1] == first) & (table.back[lag] == last), _say_pair),
    "parity": Kind(
        lambda table, odd: _positions(table) % 2 == odd,
        lambda word, odd: f"the position, counted from 0, is {'odd' if odd else 'even'}",
    ),
    "start": Kind(lambda table: _positions(table) == 0, lambda word: "it is the first position"),
    "first": Kind(
        lambda table, v: np.broadcast_to(table.tokens[:, :1] == v, table.tokens.shape),
        lambda word, v: f"the first symbol of the sequence is {word(v)}",
    ),
    "seen": Kind(
        lambda table, seen: (table.previous >= 0) == seen,
        lambda word, seen: "the symbol has occurred before" if seen else "the symbol occurs for the first time",
    ),
    "distance": Kind(
        lambda table, most: (table.distance > 0) & (table.distance <= most),
        lambda word, most: f"the symbol has occurred in the {'token' if most == 1 else f'{most} tokens'} before",
    ),
    "followed": Kind(
        lambda table, v: table.followed == v,
        lambda word, v: f"the last occurrence of the symbol was followed by {word(v)}",
    ),
    "class": Kind(
        lambda table, number: table.classes.get(_CLASSES[number], np.zeros(table.tokens.shape, bool)),
        lambda word, number: _CLASSES[number],
    ),
}


class Predicate(NamedTuple):
    """A kind of KINDS with its numbers."""

    kind: str
    numbers: tuple[int, ...] = ()

    def holds(self, table: Table) -> Elements:
        return KINDS[self.kind].apply(table, *self.numbers)

    def say(self, symbol: Symbol) -> str:
        return KINDS[self.kind].say(functools.partial(plain_symbol, symbol), *self.numbers)


class Rule(NamedTuple):
    """Holds where all predicates of some clause do; without clauses, nowhere."""

    clauses: tuple[tuple[Predicate, ...], ...] = ()

    def holds(self, table: Table) -> Elements:
        none = np.zeros(table.tokens.shape, bool)
        each = (np.logical_and.reduce([p.holds(table) for p in clause]) for clause in self.clauses)
        return functools.reduce(np.logical_or, each, none)

    def say(self, symbol: Symbol) -> str:
        """In words; "" without clauses."""
        return "; or ".join(" and ".join(p.say(symbol) for p in clause) for clause in self.clauses)


def candidates(table: Table, positive: Elements, shown: Elements, most: int) -> list[Predicate]:
    """Predicates that may explain the `positive` ones of the elements `shown`: all without a symbol, and of those with
    one the `most` of each kind and lag whose own F1 is largest. For every lag also a set: of the LARGEST_SET symbols
    with the largest own F1 the first in the order of their precision, as many as have the largest F1."""
    found: list[Predicate] = []
    for lag in range(LAGS):
        values, hits, total = _counts(table.back[lag], positive, shown)
        best = _order(hits, total, int(positive.sum()))
        found += [Predicate("symbol", (lag, int(values[n]))) for n in best[:most]]
        found += [Predicate("symbol", (lag, *several)) for several in _best_set(values, hits, total, positive)]
    base = int(table.tokens.max(initial=0)) + 1
    for lag in range(min(PAIRS, LAGS - 1)):
        first, last = table.back[lag + 1], table.back[lag]
        codes = np.where(first >= 0, first.astype(np.int64) * base + last, NOTHING)
        values, hits, total = _counts(codes, positive, shown)
        pairs = [divmod(int(values[n]), base) for n in _order(hits, total, int(positive.sum()))[:most]]
        found += [Predicate("pair", (lag, *pair)) for pair in pairs]
    for kind, codes in (("first", np.broadcast_to(table.tokens[:, :1], shown.shape)), ("followed", table.followed)):
        values, hits, total = _counts(codes, positive, shown)
        found += [Predicate(kind, (int(values[n]),)) for n in _order(hits, total, int(positive.sum()))[:most]]
    found += [Predicate("parity", (odd,)) for odd in (0, 1)] + [Predicate("start")]
    found += [Predicate("seen", (seen,)) for seen in (1, 0)] + [Predicate("distance", (most,)) for most in DISTANCES]
    return found + [Predicate("class", (n,)) for n, name in enumerate(_CLASSES) if name in table.classes]


def _counts(codes: Any, positive: Elements, shown: Elements) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes >= 0 of positive elements, how many of these have each, and how many of all elements shown."""
    values, hits = np.unique(codes[positive & (codes >= 0)], return_counts=True)
    if not len(values):
        return values, hits, hits
    every = codes[shown]
    place = np.minimum(np.searchsorted(values, every), len(values) - 1)
    return values, hits, np.bincount(place[values[place] == every], minlength=len(values))


def _order(hits: np.ndarray, total: np.ndarray, positive: int) -> list[int]:
    return np.argsort(-2 * hits / (positive + total), kind="stable").tolist() if len(hits) else []


def _best_set(values: np.ndarray, hits: np.ndarray, total: np.ndarray, positive: Elements) -> Sequence[tuple[int, ...]]:
    """The set of symbols, in order; nothing if it is one symbol."""
    if len(values) < 2:
        return ()
    chosen = np.sort(_order(hits, total, int(positive.sum()))[:LARGEST_SET])
    values, hits, total = (array[chosen] for array in (values, hits, total))
    order = np.argsort(-hits / total, kind="stable")
    f1 = 2 * np.cumsum(hits[order]) / (positive.sum() + np.cumsum(total[order]))
    size = int(f1.argmax()) + 1
    return [tuple(sorted(values[order[:size]].tolist()))] if size > 1 else ()
