"""Timing of several functions in turn, so that noise of the machine affects all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of every call, in call order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def interleave(functions: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float) -> dict[str, Times]:
    """Call every function once per round, in a new order each round, for at least `rounds` rounds and `seconds`
    seconds.

    Functions must block until their work is done. Each is called once before, untimed.
    """
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    until = time.monotonic() + seconds
    while len(found[order[0]]) < rounds or time.monotonic() < until:
        shuffle(order)
        for name in order:
            began = time.perf_counter()
            functions[name]()
            found[name].append(time.perf_counter() - began)
    return {name: Times(tuple(times)) for name, times in found.items()}
