"""Timing of several functions in turn, so that noise of the machine affects all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Times:
    """Seconds of every call, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Race:
    """Times of several functions, called once per round each."""

    times: Mapping[Any, Times]

    def ms(self, name: Hashable) -> float:
        """The median in milliseconds."""
        return 1e3 * self.times[name].median

    def row(self, name: Hashable) -> dict[str, Any]:
        times = self.times[name]
        return {"median_ms": self.ms(name), "best_ms": 1e3 * times.best, "rounds": len(times.seconds)}

    def ratio(self, what: str, of: Hashable, over: Hashable) -> dict[str, Any]:
        """The ratio of two medians, as `what`, and the quartiles of the ratios within a round: noise that slows a whole
        round leaves them alone, so they are the spread of the comparison."""
        rounds = np.divide(self.times[of].seconds, self.times[over].seconds)
        quartiles = np.percentile(rounds, (25, 75)).tolist()
        return {what: self.ms(of) / self.ms(over), f"{what}_quartiles": quartiles}


def interleave(functions: Mapping[Any, Callable[[], object]], *, rounds: int, seconds: float) -> Race:
    """Call every function once per round, in a new order each round, for at least `rounds` rounds and `seconds`
    seconds.

    Functions must block until their work is done. Each is called once before, untimed.
    """
    for function in functions.values():
        function()
    found: dict[Any, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    until = time.monotonic() + seconds
    while len(found[order[0]]) < rounds or time.monotonic() < until:
        shuffle(order)
        for name in order:
            began = time.perf_counter()
            functions[name]()
            found[name].append(time.perf_counter() - began)
    return Race({name: Times(tuple(times)) for name, times in found.items()})
