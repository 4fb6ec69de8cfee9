"""What an interpreter is given, and what it answers.

    description, score = examine(function, interpreter, budget=40)

An answer names a template of a fixed table, with its numbers. Its text is for people: nothing executes it.
Everything that does not fit raises ValueError.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

Numbers = tuple[int | float, ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """An answer. `template` None means that there is none, and scores 0."""

    text: str
    template: str | None = None
    numbers: Numbers = ()


class Score(NamedTuple):
    """0 to 1, over all inputs, those outside of the corruption and those inside, None without one; and whether the
    template's name is right."""

    overall: float
    outside: float
    inside: float | None
    template: bool


class Query:
    """A function that answers `budget` inputs in all, `left` of them still. More are refused before any is answered."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], budget: int):
        if budget < 1:
            raise ValueError(f"budget={budget}: it must be at least 1")
        self._function, self.budget, self.left = function, budget, budget

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The answers to inputs x (N, ...)."""
        if len(x) > self.left:
            raise ValueError(f"query of {len(x)} inputs: {self.left} of the budget of {self.budget} are left")
        self.left -= len(x)
        return self._function(x)


@runtime_checkable
class Interpreter(Protocol):
    """Whatever asks a function and says what it is."""

    def interpret(self, query: Query, budget: int) -> Description: ...


@runtime_checkable
class Function(Protocol):
    """A black box: inputs (N, ...) to answers, and how right a description of it is."""

    def __call__(self, x: np.ndarray) -> np.ndarray: ...

    def score(self, description: Description) -> Score: ...


def examine(function: Function, interpreter: Interpreter, budget: int) -> tuple[Description, Score]:
    """What an interpreter says of a function after `budget` inputs at most, and how right it is."""
    description = interpreter.interpret(Query(function, budget), budget)
    return description, function.score(description)
