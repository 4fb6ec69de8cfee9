"""Interpreters that need no model: templates by trimmed least squares, and the best of all candidates."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seqboat.interp.functions import numeric
from seqboat.interp.functions.numeric import EXCEPT, FAMILIES, HIGH, LOW, WIDTHS
from seqboat.interp.functions.protocol import Description, Numbers, Query
from seqboat.interp.functions.symbols import Table, inputs

KEPT = 0.75  # the share of points that the first, trimmed fit explains
CONSISTENT = 1.65  # sigma over the root mean square of that share of the residuals, if they are normal
BOUND, OFF = 4.0, 5.0  # in sigma: where a residual counts no more in a fit, and where its point is off
LEAST = 1e-4  # sigma is at least this part of the standard deviation of y
STARTS, ROUNDS, SHRINK = 3, 8, 0.35  # the search for the numbers of a shape


class Fit(NamedTuple):
    """A family with its numbers, and the standard deviation of the residuals without those that are off."""

    family: str
    numbers: Numbers
    sigma: float

    def residuals(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return y - numeric.values(self.family, self.numbers, x)

    def off(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The points (N,) that the family does not explain."""
        return abs(self.residuals(x, y)) > OFF * self.sigma


def fit(x: np.ndarray, y: np.ndarray, sigma: float | None = None) -> Fit:
    """The family that explains points x, y (N,) best. With a known noise sigma all points count; without it is robust:
    least trimmed squares (Rousseeuw 1984) estimate sigma, and residuals r count up to 4 of it. The family minimises

        sum_i min(r_i, 4 sigma)^2 / sigma^2 + (number of its numbers) ln N

    and has fewer numbers than there are points. Less than 3 points are described by their mean.
    """
    names = [name for name, family in FAMILIES.items() if len(family.names) < len(x)]
    least = LEAST * y.std() + 1e-300
    if not names:
        return Fit("linear", (0.0, float(y.mean())), float(least))
    bound, h = np.inf, len(x)
    if sigma is None:
        h = int(np.ceil(KEPT * h))
        trimmed = min(_regress(_curves(name, x, _shapes(name)), y, h)[2].min() for name in names)
        bound = BOUND * max(CONSISTENT * trimmed**0.5, least)
    fits = [_refine(name, x, y, h, bound) for name in names]
    squares = np.square([y - numeric.values(name, numbers, x) for name, numbers in zip(names, fits, strict=True)])
    if sigma is None:
        sigma = 1.4826 * float(np.median(squares, axis=1).min()) ** 0.5
        bound = BOUND * max(sigma, least)
    sigma = max(sigma, float(least))
    costs = np.minimum(squares, bound**2).sum(1) / sigma**2 + np.array([*map(len, fits)]) * np.log(len(x))
    best = int(costs.argmin())
    return Fit(names[best], fits[best], sigma)


def _refine(name: str, x: np.ndarray, y: np.ndarray, h: int, bound: float) -> Numbers:
    """The numbers of a family with the least bounded squares: a grid of shapes, then finer ones around the best."""
    shapes = _shapes(name)
    bounds = np.array(list(FAMILIES[name].shape.values())).reshape(-1, 2)
    around = np.ptp(bounds, axis=1) / _side(name) * _grid(5, len(bounds))
    for _ in range(ROUNDS if len(bounds) else 0):
        best = shapes[np.argsort(_regress(_curves(name, x, shapes), y, h, bound)[2])[:STARTS]]
        shapes = np.concatenate([best, (best[:, None] + around).reshape(-1, len(bounds))])
        shapes, around = np.clip(shapes, *bounds.T), around * SHRINK
    a, b, error = _regress(_curves(name, x, shapes), y, h, bound)
    first = int(error.argmin())
    return float(a[first]), float(b[first]), *shapes[first].tolist()


def _side(name: str) -> int:
    return {0: 1, 1: 32, 2: 16}[len(FAMILIES[name].shape)]


def _shapes(name: str) -> np.ndarray:
    """A grid of shapes (G, numbers) within the bounds of a family."""
    bounds = np.array(list(FAMILIES[name].shape.values())).reshape(-1, 2)
    return bounds.mean(1) + np.ptp(bounds, axis=1) / 2 * _grid(_side(name), len(bounds))


def _grid(side: int, dimensions: int) -> np.ndarray:
    """Points (side ** dimensions, dimensions) of the cube from -1 to 1."""
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * dimensions)
    return np.stack([axis.ravel() for axis in axes], 1) if axes else np.zeros((1, 0))


def _curves(name: str, x: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """g (G, N) at x (N,) for every shape."""
    return np.broadcast_to(FAMILIES[name].g(x, *shapes.T[..., None]), (len(shapes), len(x)))


def _regress(
    g: np.ndarray, y: np.ndarray, h: int, bound: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a, b (G,) and the error of a g + b, for every row of g (G, N): concentration steps (Rousseeuw and Van Driessen
    1999) to the h smallest residuals, and with a bound to those within it. The error is the mean square of the
    smallest, or of all up to the bound."""
    weight = np.ones(g.shape)
    steps = [h] * (3 if h < len(y) else 1) + [0] * (2 if bound is not None and bound < np.inf else 0)
    for smallest in steps:
        weight = weight / weight.sum(1, keepdims=True)
        mean_g, mean_y = (weight * g).sum(1, keepdims=True), (weight * y).sum(1, keepdims=True)
        variance = (weight * np.square(g - mean_g)).sum(1, keepdims=True)
        a = (weight * (g - mean_g) * (y - mean_y)).sum(1, keepdims=True) / np.maximum(variance, 1e-30)
        b = mean_y - a * mean_g
        squares = np.square(a * g + b - y)
        nearest = np.partition(squares, h - 1, axis=1)[:, :h]
        limit = nearest[:, -1:]
        if not smallest and bound is not None:
            limit = np.maximum(limit, bound**2)
        weight = squares <= limit
    error = nearest.mean(1) if bound is None else np.minimum(squares, bound**2).mean(1)
    return a[:, 0], b[:, 0], error


class Edges(NamedTuple):
    """Each end of an interval is between a point outside of it and one inside."""

    low_outside: float
    low_inside: float
    high_inside: float
    high_outside: float

    def halfway(self) -> tuple[float, float]:
        return (self.low_outside + self.low_inside) / 2, (self.high_inside + self.high_outside) / 2


def find_interval(x: np.ndarray, off: np.ndarray) -> Edges | None:
    """The stretch of at most the width of a corruption with the most points that are off, if there is one."""
    if not off.any():
        return None
    starts = np.sort(x[off])
    counts = [((starts >= start) & (starts <= start + WIDTHS[1])).sum() for start in starts]
    low = starts[int(np.argmax(counts))]
    high = starts[starts <= low + WIDTHS[1]].max()
    return Edges(x[x < low].max(initial=LOW), low, high, x[x > high].min(initial=HIGH))


def assemble(x: np.ndarray, y: np.ndarray, interval: tuple[float, float] | None) -> Description:
    """One family outside of the interval and one inside, each fitted to its own points."""
    low, high = interval or (HIGH, LOW)
    inside = (x >= low) & (x <= high)
    outer = fit(x[~inside], y[~inside])
    template, numbers = outer.family, outer.numbers
    if interval:
        z = (x[inside] - (low + high) / 2) * (HIGH - LOW) / (high - low)
        inner = fit(z, y[inside], outer.sigma)
        template, numbers = template + EXCEPT + inner.family, (*numbers, low, high, *inner.numbers)
    return Description(numeric.text(template, numbers), template, numbers)


def uniform(count: int, rng: np.random.Generator) -> np.ndarray:
    """Independent points of the domain."""
    return rng.uniform(LOW, HIGH, count)


def even(count: int, rng: np.random.Generator) -> np.ndarray:
    """Evenly spaced points with a random start."""
    return LOW + (HIGH - LOW) * (np.arange(count) + rng.random()) / count


@dataclasses.dataclass(frozen=True)
class Probing:
    """Asks for the whole budget at once, at points by `points(count, rng)`. Describes one family, or with `interval`
    also an interval, whose edges are halfway between points."""

    seed: int = 0
    points: Callable[[int, np.random.Generator], np.ndarray] = uniform
    interval: bool = False

    def interpret(self, query: Query, budget: int) -> Description:
        x = self.points(budget, np.random.default_rng(self.seed))
        y = query(x)
        edges = find_interval(x, fit(x, y).off(x, y)) if self.interval else None
        return assemble(x, y, edges and edges.halfway())


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Half of the budget evenly. If points are off their fit, a quarter for the edges of the interval by bisection, and
    the rest evenly within it; otherwise the other half at random."""

    seed: int = 0

    def interpret(self, query: Query, budget: int) -> Description:
        rng = np.random.default_rng(self.seed)
        x = even((budget + 1) // 2, rng)
        y = query(x)
        found = fit(x, y)
        edges = find_interval(x, found.off(x, y))
        if edges is None:
            x, y = self._ask(query, x, y, uniform(query.left, rng))
            edges = find_interval(x, fit(x, y).off(x, y))
            return assemble(x, y, edges and edges.halfway())
        interval = []
        for outside, inside in (edges[:2], edges[:1:-1]):
            for _ in range(budget // 8):
                middle = (outside + inside) / 2
                x, y = self._ask(query, x, y, np.array([middle]))
                outside, inside = (outside, middle) if found.off(x[-1:], y[-1:])[0] else (middle, inside)
            interval.append((outside + inside) / 2)
        low, high = interval
        x, y = self._ask(query, x, y, low + (high - low) * (np.arange(query.left) + 0.5) / max(query.left, 1))
        return assemble(x, y, (low, high))

    @staticmethod
    def _ask(query: Query, x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([x, new]), np.concatenate([y, query(new)])


@dataclasses.dataclass(frozen=True)
class Search:
    """Asks for random inputs, and takes the first of all candidates of a table that agrees most."""

    table: Table
    seed: int = 0

    def interpret(self, query: Query, budget: int) -> Description:
        x = inputs(budget, np.random.default_rng(self.seed))
        y = query(x)
        name, numbers, _ = max(self.table.answers(x), key=lambda found: np.count_nonzero(found[2] == y))
        return Description(f"{name} ({', '.join(map(str, numbers))})", name, numbers)
