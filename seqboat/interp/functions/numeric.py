"""Functions of a number in [-128, 128]: y = a g(x; shape) + b, with g of one of eight families.

A corrupted function is another one in an interval of 15 to 30: "sine except relu" is a sine outside of it, and within
a relu of z = 256 (x - middle) / width, so that the interval is the domain of the second one. The numbers of a template
are (a, b, *shape), and of a corrupted one (outer numbers, low, high, inner numbers).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from seqboat.interp.functions.protocol import Description, Numbers, Score

LOW, HIGH = -128.0, 128.0
WIDTHS = 15.0, 30.0  # of corrupted intervals
POINTS = 256  # on which a description is scored, in every region
RIGHT = 0.1  # a description is right below this NMSE
EXCEPT = " except "


@dataclasses.dataclass(frozen=True)
class Family:
    """g(x, *shape), and from where to where the numbers of its shape are drawn."""

    g: Callable[..., Any]
    shape: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return ("a", "b", *self.shape)


_CENTRE = {"centre": (-48.0, 48.0)}
FAMILIES = {
    "linear": Family(lambda x: x / HIGH),
    "quadratic": Family(lambda x, c: ((x - c) / HIGH) ** 2, _CENTRE),
    "absolute": Family(lambda x, c: abs(x - c) / HIGH, _CENTRE),
    "relu": Family(lambda x, c: np.maximum(x - c, 0) / HIGH, _CENTRE),
    "step": Family(lambda x, c: 1.0 * (x >= c), _CENTRE),
    "sine": Family(
        lambda x, p, phase: np.sin(2 * np.pi * x / p + phase), {"period": (40.0, 128.0), "phase": (0.0, 2 * np.pi)}
    ),
    "exponential": Family(lambda x, s: np.exp(x / s), {"scale": (25.0, 80.0)}),
    "gaussian": Family(lambda x, c, s: np.exp(-(((x - c) / s) ** 2) / 2), {**_CENTRE, "scale": (20.0, 50.0)}),
}


def parts(template: str, numbers: Numbers) -> list[tuple[str, Numbers]]:
    """The families of a template with their numbers: one, or ("sine", ...), ("", (low, high)), ("relu", ...).
    Raises ValueError for a family, a count of numbers or an interval that does not exist."""
    names = template.split(EXCEPT)
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"template={template!r}: {name!r} is not a family; there are {', '.join(FAMILIES)}")
    names = [names[0], *(part for name in names[1:] for part in ("", name))]
    counts = [len(FAMILIES[name].names) if name else 2 for name in names]
    if len(names) > 3 or sum(counts) != len(numbers):
        raise ValueError(
            f"template={template!r}: {len(numbers)} numbers, and it has {sum(counts)} in {len(names)} parts"
        )
    ends = np.cumsum(counts)
    found = [(name, tuple(numbers[end - count : end])) for name, count, end in zip(names, counts, ends, strict=True)]
    if len(found) > 1 and not LOW <= found[1][1][0] < found[1][1][1] <= HIGH:
        raise ValueError(f"interval {found[1][1]}: it must be within {LOW:g} and {HIGH:g}, the lower end first")
    return found


def values(template: str, numbers: Numbers, x: np.ndarray) -> np.ndarray:
    """y (N,) of x (N,), without noise. A number that makes no sense, as a period of 0, gives values that are not
    finite."""

    def family(part: tuple[str, Numbers], x: np.ndarray) -> np.ndarray:
        a, b, *shape = part[1]
        with np.errstate(all="ignore"):
            return a * FAMILIES[part[0]].g(x, *shape) + b

    found = parts(template, numbers)
    if len(found) == 1:
        return family(found[0], x)
    outer, (_, (low, high)), inner = found
    z = (x - (low + high) / 2) * (HIGH - LOW) / (high - low)
    return np.where((x >= low) & (x <= high), family(inner, z), family(outer, x))


def text(template: str, numbers: Numbers) -> str:
    """The template in words."""
    say = lambda name, own: (
        f"{name}({', '.join(f'{n}={v:.4g}' for n, v in zip(FAMILIES[name].names, own, strict=True))})"
    )
    outer, *rest = parts(template, numbers)
    if not rest:
        return say(*outer)
    return f"{say(*outer)}; from {rest[0][1][0]:.4g} to {rest[0][1][1]:.4g}, stretched over the domain, {say(*rest[1])}"


@dataclasses.dataclass(frozen=True)
class NumericFunction:
    """A template with its numbers, and noise of standard deviation `noise`, which depends on `seed` and x alone: the
    same x has the same answer, whatever was asked before. Raises ValueError for a template that does not exist."""

    seed: int
    template: str
    numbers: Numbers
    noise: float = 0.0

    def __post_init__(self) -> None:
        parts(self.template, self.numbers)

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high) of the corruption."""
        found = parts(self.template, self.numbers)
        return None if len(found) == 1 else (found[1][1][0], found[1][1][1])

    def values(self, x: np.ndarray) -> np.ndarray:
        """Without noise."""
        return values(self.template, self.numbers, x)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """y (N,) of x (N,). Raises ValueError outside of the domain."""
        x = np.asarray(x, np.float64) + 0.0  # 0 for -0
        if not ((x >= LOW) & (x <= HIGH)).all():
            raise ValueError(f"query: x must be within {LOW:g} and {HIGH:g}")
        bits = x.view(np.uint64).tolist()
        return self.values(x) + self.noise * np.array([np.random.default_rng((self.seed, n)).normal() for n in bits])

    def nmse(self, description: Description) -> tuple[float, float, float | None]:
        """mean (y - f)^2 / var(f) over the domain, outside of the corruption and inside; infinite without an answer."""
        x = np.linspace(LOW, HIGH, POINTS)
        if self.interval is None:
            whole = self._nmse(description, x)
            return whole, whole, None
        low, high = self.interval
        outside = x[(x < low) | (x > high)]
        inside = low + (high - low) * (np.arange(POINTS) + 0.5) / POINTS
        return tuple(self._nmse(description, part) for part in (x, outside, inside))  # type: ignore[return-value]

    def _nmse(self, description: Description, x: np.ndarray) -> float:
        if description.template is None:
            return float("inf")
        f, y = self.values(x), values(description.template, description.numbers, x)
        return float(np.square(y - f).mean() / f.var())

    def score(self, description: Description) -> Score:
        """1 where the NMSE is below `RIGHT`, and 0 elsewhere."""
        whole, outside, inside = (None if error is None else float(error < RIGHT) for error in self.nmse(description))
        return Score(whole or 0.0, outside or 0.0, inside, description.template == self.template)


def draw(seed: int, family: str | None = None, noise: float = 0.05, corrupted: bool = False) -> NumericFunction:
    """A function from a seed, of any family or a named one. `noise` is relative to the standard deviation of the
    function outside of the corruption, which is 1 to 100; its offset is up to 5 of them, and the corruption is 1 to 3
    of them away from what it replaces. Raises ValueError for an unknown family."""
    rng = np.random.default_rng((seed, 1))
    family = str(rng.choice(list(FAMILIES))) if family is None else family
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: there are {', '.join(FAMILIES)}")
    spread = float(10 ** rng.uniform(0, 2))
    outer = _numbers(rng, family, spread, spread * rng.uniform(-5, 5))
    if not corrupted:
        return NumericFunction(seed, family, outer, noise * spread)
    width = rng.uniform(*WIDTHS)
    low = float(rng.uniform(LOW + 10, HIGH - 10 - width))
    interval = low, low + float(width)
    middle = values(family, outer, np.linspace(*interval, POINTS)).mean()
    level = middle + rng.choice([-1, 1]) * spread * rng.uniform(1, 3)
    inside = str(rng.choice(list(FAMILIES)))
    inner = _numbers(rng, inside, spread * rng.uniform(0.5, 1), level)
    return NumericFunction(seed, family + EXCEPT + inside, (*outer, *interval, *inner), noise * spread)


def _numbers(rng: np.random.Generator, family: str, spread: float, mean: float) -> Numbers:
    """Numbers of a family with this standard deviation and mean over the domain."""
    shape = [float(rng.uniform(*bounds)) for bounds in FAMILIES[family].shape.values()]
    g = FAMILIES[family].g(np.linspace(LOW, HIGH, POINTS), *shape)
    a = rng.choice([-1, 1]) * spread / g.std()
    return float(a), float(mean - a * g.mean()), *shape
