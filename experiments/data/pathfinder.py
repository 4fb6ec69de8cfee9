"""Pathfinder and Path-X pictures as in the Long Range Arena (Linsley et al. 2018, arXiv 1805.08315).

Two dashed target snakes, shorter distractor snakes and two discs: the label is 1 if the discs mark the ends of the same
target. Everything here is a pure function of parameters, seed, split and index.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from jaxtyping import Float, Int, UInt8

from experiments.data import workers
from experiments.data.pathfinder_board import (
    DEGREES,
    Board,
    Dash,
    Geometry,
    PathfinderParameters,
    Point,
    draw_dashes,
    draw_discs,
    go,
    make_geometry,
)

CLASSES = 2
CHUNK = 50  # pictures per piece of parallel work; the data do not depend on it
DIFFICULTIES = {"easy": 6, "intermediate": 9, "hard": 14}  # dashes of a target snake

_RETRIALS = 2  # retries for a dash, a seed or a second target
_DISTRACTOR_RETRIALS = 4
_SMALLEST_WEIGHT = 255e-4
_SMALLEST_FREE_SHARE = 0.01


def _presets() -> dict[str, PathfinderParameters]:
    # LRA documents the hard values; the other lengths are from the published generator's folder names.
    presets = {}
    for name, length in DIFFICULTIES.items():
        short = length // 3
        presets[f"32_{name}"] = PathfinderParameters(
            32, length, short, 20 // short, 2, 0.5, (1,), 1.5, 7, continuity=1.0, contrast=2.0, target_contrast=0.75
        )
        presets[f"128_{name}"] = PathfinderParameters(
            128, length, short, 35 // short, 5, 1.5, (2, 3), 3, 20, continuity=1.8, contrast=0.9, target_contrast=1.0
        )
    return presets


PRESETS = _presets()


@dataclass(frozen=True)
class Example:
    """A picture and how it was generated.

    Attributes:
      image: [size, size], 0 to 255.
      label: 1 if both markers are ends of one target.
      targets: the ends of dashes along each of the two targets, [contour_length, 2] each, from end to end.
      markers: positions of the two discs, [2, 2].
      attempts: number of pairs of targets started until one was finished.
      distractors: number of distractors placed.
      peak: the brightest value before the picture was scaled to 0 to 255.
    """

    image: UInt8[np.ndarray, "R R"]
    label: int
    targets: tuple[Int[np.ndarray, "N 2"], Int[np.ndarray, "N 2"]]
    markers: Int[np.ndarray, "2 2"]
    attempts: int
    distractors: int
    peak: float


def generate(parameters: PathfinderParameters, seed: int, split: int, index: int) -> Example:
    """One example, a pure function of its arguments. Raises UserError if OpenCV is not installed.

    Does not return if the parameters leave no room for two targets.
    """
    rng = np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence([seed, split, index])))
    geometry = make_geometry(parameters, parameters.margins[_below(rng, len(parameters.margins))])
    attempts = 1
    while (pair := _draw_pair(geometry, rng)) is None:
        attempts += 1
    targets, board = pair
    dashes = [dash for target in targets for dash in target.dashes]
    image = np.zeros((parameters.size, parameters.size))
    draw_dashes(image, geometry, dashes, parameters.contrast * parameters.target_contrast)
    distractors = 0
    for _ in range(parameters.distractors):
        for _ in range(1 + _DISTRACTOR_RETRIALS):
            if placed := _draw_distractor(geometry, board, rng):
                snake, board = placed
                draw_dashes(image, geometry, snake.dashes, parameters.contrast)
                distractors += 1
                break

    label = _below(rng, CLASSES)
    first = _below(rng, 2)
    paths = tuple(np.array([(row, column) for _, row, column in target.dashes]) for target in targets)
    markers = np.stack([paths[first][0], paths[first if label else 1 - first][-1]])
    np.maximum(image, draw_discs(parameters, markers) / 255, out=image)
    scaled = _scale(image)
    return Example(scaled, label, (paths[0], paths[1]), markers, attempts, distractors, float(image.max()))


def generate_split(
    parameters: PathfinderParameters, seed: int, split: int, size: int, processes: int = 1
) -> Iterator[Example]:
    """Yields the first `size` examples of a split, in order; they do not depend on `processes`."""
    chunks = workers.chunks(partial(generate_chunk, parameters, seed, split), processes)
    yield from islice((example for chunk in chunks for example in chunk), size)


def generate_chunk(parameters: PathfinderParameters, seed: int, split: int, chunk: int) -> list[Example]:
    """Examples CHUNK * chunk to CHUNK * (chunk + 1) - 1 of a split."""
    return [generate(parameters, seed, split, index) for index in range(CHUNK * chunk, CHUNK * (chunk + 1))]


class _Snake:
    """A growing snake: its dashes, and the pivot and direction of the next one."""

    def __init__(self, geometry: Geometry, degree: int, tail: Point):
        self.dashes: list[Dash] = [(degree, *tail)]
        self.direction = degree
        self.head = go(tail, geometry.heads[degree])
        self.pivot = go(self.head, geometry.pivots[degree])

    def inside(self, size: int) -> bool:
        """Whether its tail, head and pivot are in the picture."""
        return all(0 <= x < size for point in (self.dashes[0][1:], self.head, self.pivot) for x in point)

    def extend(self, board: Board, rng: np.random.Generator) -> bool:
        """Adds a dash if there is room. The previous dash is drawn on the board only now, so that it does not block
        it."""
        geometry = board.geometry
        row, column = go(self.pivot, geometry.moves[self.direction])
        cumulative = (geometry.turns[self.direction] * board.openness(row, column)).cumsum()
        total = float(cumulative[-1])
        if total < _SMALLEST_WEIGHT:
            return False
        for _ in range(1 + _RETRIALS):
            place = int(cumulative.searchsorted(rng.random() * total, side="right"))
            offset = geometry.places[place]
            dash = DEGREES + place, row + offset[0], column + offset[1]
            if board.fits(dash):
                board.add(self.dashes[-1])
                self.dashes.append(dash)
                self.pivot = row, column
                self.direction = DEGREES + place
                return True
        return False


def _draw_pair(geometry: Geometry, rng: np.random.Generator) -> tuple[list[_Snake], Board] | None:
    """One attempt at two targets, grown in turns on one board; None if it fails."""
    parameters = geometry.parameters
    first = _seed(geometry, geometry.target_seeds.__getitem__, rng)
    second = first and _seed_beside(geometry, first, rng)
    if not first or not second:
        return None
    snakes, board = [first, second], geometry.empty.copy()
    for _ in range(parameters.contour_length - 1):
        for snake in snakes:
            if not snake.extend(board, rng):
                return None
    board.add(second.dashes[-1])  # the first target's last dash is never drawn on the board, as published
    return snakes, board


def _draw_distractor(geometry: Geometry, board: Board, rng: np.random.Generator) -> tuple[_Snake, Board] | None:
    """One attempt at a distractor: the snake and the board with it; None if it fails."""
    parameters = geometry.parameters
    occupied = board.occupied()
    if occupied.mean() > 1 - _SMALLEST_FREE_SHARE:
        return None
    snake = _seed(geometry, lambda degree: geometry.free(degree, occupied), rng)
    if not snake:
        return None
    board = board.copy()
    for _ in range(parameters.distractor_length - 1):
        if not snake.extend(board, rng):
            return None
    board.add(snake.dashes[-1])
    return snake, board


def _seed(geometry: Geometry, free: Callable[[int], Int[np.ndarray, " M"]], rng: np.random.Generator) -> _Snake | None:
    """A snake of one dash at a random pixel that is free for its direction; None if there is none."""
    for _ in range(1 + _RETRIALS):
        degree = _below(rng, DEGREES)
        pixels = free(degree)
        if not len(pixels):
            return None
        snake = _Snake(geometry, degree, divmod(int(pixels[_below(rng, len(pixels))]), geometry.parameters.size))
        if snake.inside(geometry.parameters.size):
            return snake
    return None


def _seed_beside(geometry: Geometry, first: _Snake, rng: np.random.Generator) -> _Snake | None:
    """The second target's first dash, at the seed distance from the first's."""
    _, row, column = first.dashes[0]
    for _ in range(1 + _RETRIALS):
        degree = _below(rng, DEGREES)
        down, right = geometry.bearings[_below(rng, DEGREES)]
        snake = _Snake(geometry, degree, (round(row + down), round(column + right)))
        if snake.inside(geometry.parameters.size):
            return snake
    return None


def _scale(image: Float[np.ndarray, "R R"]) -> UInt8[np.ndarray, "R R"]:
    """The picture scaled linearly to 0..255."""
    low, high = image.min(), image.max()
    return ((image - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


def _below(rng: np.random.Generator, bound: int) -> int:
    """Uniform in 0 to bound - 1. Several times faster than rng.integers for one number."""
    return int(rng.random() * bound)
