"""The drawing board of Pathfinder pictures: stamps of dashes, tables over directions and turns, the mask of the
drawing.

Points are (row, column) in pixels, and direction t is the vector (sin t, cos t). Masks are integers, 0 to 255 for 0 to
1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from experiments.common.errors import UserError

DEGREES = 360  # seeds have whole degrees: direction i < 360 is i - 180 degrees

_OCCUPIED = 76  # a mask above 0.3
_OVERLAP = 459  # masks that sum to 1.8

Point = tuple[int, int]
Dash = tuple[int, int, int]  # index of its direction, row and column of its stamp's centre


@dataclass(frozen=True)
class PathfinderParameters:
    """Parameters of the drawing; lengths in pixels of a picture of size x size. PRESETS has the published values.

    contour_length and distractor_length are dashes per snake; paddle_length and thickness are the size of a dash.
    margins are gaps between dashes, one drawn for each picture. Larger continuity makes straighter snakes. The
    brightness of distractors is `contrast`, of targets contrast * target_contrast, of discs 1.

    border_quirk: the published generator gives up on a seed if OpenCV's dilation sees only pixels outside the picture,
      which at 32x32 leaves only 30 of 360 first directions. False draws what it meant to.
    """

    size: int
    contour_length: int
    distractor_length: int
    distractors: int
    paddle_length: int
    thickness: float
    margins: tuple[int, ...]
    marker_radius: float
    seed_distance: int
    continuity: float
    contrast: float
    target_contrast: float
    antialias: int = 2
    padding: int = 1
    border_quirk: bool = True


def opencv() -> ModuleType:
    """Imports OpenCV, used only here. Raises UserError if it is missing."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"Pathfinder is drawn with OpenCV: pip install opencv-python-headless ({error})") from error
    return cv2


class Geometry:
    """Tables that depend only on parameters and margin: stamps of dashes, and tables over directions and turns.

    Directions are numbered: 360 whole degrees for seeds, then one per candidate position of a next dash, which are the
    pixels on a circle around the end of the snake. A stamp starts at its centre; that of a next dash points back to the
    snake.
    """

    def __init__(self, parameters: PathfinderParameters, margin: int):
        length, size = parameters.paddle_length, parameters.size
        radius = length + margin
        self.parameters = parameters
        self.pad = 2 * length + 3 * margin + 3  # the largest reach of stamps and candidates outside the picture
        self.width = size + 2 * self.pad

        places = _circle(radius)
        degrees = (np.arange(DEGREES) - 180) * np.pi / 180  # in this order of operations, as published
        turned = np.arctan2(places[:, 0], places[:, 1])
        self.places: list[Point] = [(row, column) for row, column in places.tolist()]
        self.place_offsets = places @ [self.width, 1]

        directions = np.concatenate([degrees, turned])
        difference = np.abs(directions[:, None] - turned)
        difference = np.minimum(difference, 2 * np.pi - difference)
        self.turns = np.cos(np.minimum(difference * parameters.continuity, np.pi / 2)) ** 2
        self.moves = [_vector(direction, length + 2 * margin) for direction in directions]
        self.heads = [_vector(degree, length) for degree in degrees]
        self.pivots = [_vector(_reversed(degree), radius) for degree in degrees]
        self.bearings = [_vector(degree, parameters.seed_distance) for degree in np.arange(DEGREES) * np.pi / 180]

        stamps = [_stamp(parameters, margin, direction) for direction in [*degrees, *map(_reversed, turned)]]
        self.lines = [line / 255 for line, _ in stamps]
        self.masks = [mask.astype(np.int16) for _, mask in stamps]
        # Dilation and maximum commute, so the mask's dilation is the maximum of dilated stamps.
        dilate = partial(opencv().dilate, kernel=_disk(margin))
        self.halos = [dilate(np.pad(mask, margin)).astype(np.int16) for _, mask in stamps]
        self.half = len(self.masks[0]) // 2
        self.halo_half = len(self.halos[0]) // 2

        border = _frame(size, parameters.padding)
        self.empty = Board(self, _padded(border, self.pad, 0), _padded(dilate(border), self.pad, 255))
        self.elements = [_element(mask, radius) for _, mask in stamps[:DEGREES]]
        self.looks_outside = [self._looks_outside(element) for element in self.elements]
        band = _frame(size, 2 * parameters.seed_distance)
        self.target_seeds = [self.free(number, band) for number in range(DEGREES)]

    def free(self, degree: int, occupied: UInt8[np.ndarray, "R R"]) -> Int[np.ndarray, " M"]:
        """Row-major indices of the pixels from which a dash in this direction touches nothing occupied."""
        if self.parameters.border_quirk and self.looks_outside[degree]:
            return np.zeros(0, int)
        return np.flatnonzero(opencv().dilate(occupied, self.elements[degree], borderValue=255) == 0)

    def _looks_outside(self, element: UInt8[np.ndarray, "K K"]) -> bool:
        """Whether from some pixel of the picture the structuring element covers none of its pixels."""
        size = self.parameters.size
        return not opencv().dilate(np.ones((size, size), np.uint8), element, borderValue=0).all()


class Board:
    """The mask of the drawing, and its dilation by the margin, against which candidates for a next dash are tested.

    Both have a frame of `pad` pixels outside the picture, which is free for stamps and closed to candidates.
    """

    def __init__(self, geometry: Geometry, mask: Int[np.ndarray, "W W"], closed: Int[np.ndarray, "W W"]):
        self.geometry = geometry
        self.mask = mask
        self.closed = closed

    def copy(self) -> "Board":
        return Board(self.geometry, self.mask.copy(), self.closed.copy())

    def occupied(self) -> UInt8[np.ndarray, "R R"]:
        """1 where the mask is above 0.3, and on the outermost pixels."""
        pad = self.geometry.pad
        occupied = (self.mask[pad:-pad, pad:-pad] > _OCCUPIED).astype(np.uint8)
        occupied[[0, -1]] = occupied[:, [0, -1]] = 1
        return occupied

    def openness(self, row: int, column: int) -> Int[np.ndarray, " P"]:
        """How free each candidate position around a point is, 0 to 255."""
        geometry = self.geometry
        index = (row + geometry.pad) * geometry.width + column + geometry.pad
        return 255 - self.closed.take(geometry.place_offsets + index)

    def fits(self, dash: Dash) -> bool:
        number, row, column = dash
        stamp = self.geometry.masks[number]
        top, left = row + self.geometry.pad - self.geometry.half, column + self.geometry.pad - self.geometry.half
        return int((self.mask[top : top + len(stamp), left : left + len(stamp)] + stamp).max()) < _OVERLAP

    def add(self, dash: Dash) -> None:
        number, row, column = dash
        geometry, pad = self.geometry, self.geometry.pad
        _raise_to(self.mask[pad:-pad, pad:-pad], geometry.masks[number], row, column)
        halo, offset = geometry.halos[number], pad - geometry.halo_half
        window = self.closed[row + offset : row + offset + len(halo), column + offset : column + offset + len(halo)]
        np.maximum(window, halo, out=window)


@lru_cache(maxsize=16)
def make_geometry(parameters: PathfinderParameters, margin: int) -> Geometry:
    return Geometry(parameters, margin)


def draw_dashes(image: Float[np.ndarray, "R R"], geometry: Geometry, dashes: list[Dash], contrast: float) -> None:
    for number, row, column in dashes:
        _raise_to(image, contrast * geometry.lines[number], row, column)


def draw_discs(parameters: PathfinderParameters, points: Int[np.ndarray, "2 2"]) -> UInt8[np.ndarray, "R R"]:
    """Full discs around the points, antialiased."""
    scale = parameters.antialias
    grid = np.arange(parameters.size * scale)
    squares = (grid - scale * points[..., None]) ** 2  # [2, 2, R scale]
    inside = squares[:, 0, :, None] + squares[:, 1, None, :] <= (parameters.marker_radius * scale) ** 2
    return _shrink(np.where(inside.any(axis=0), np.uint8(255), np.uint8(0)), parameters.size)


def _stamp(
    parameters: PathfinderParameters, margin: int, direction: float
) -> tuple[UInt8[np.ndarray, "S S"], UInt8[np.ndarray, "S S"]]:
    """The antialiased line and mask of a dash from the centre of the stamp in a direction."""
    scale, length = parameters.antialias, parameters.paddle_length
    half = length + math.ceil(parameters.thickness) + margin
    centre = half * scale
    row, column = go((centre, centre), _vector(direction, length * scale))
    canvas = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    ends = [(centre, centre), (column, row)]
    ImageDraw.Draw(canvas).line(ends, fill=255, width=int(parameters.thickness * scale))
    line = np.asarray(canvas)
    mask = opencv().dilate(line, _disk(margin * scale))
    return _shrink(line, 2 * half + 1), _shrink(mask, 2 * half + 1)


def _element(mask: UInt8[np.ndarray, "S S"], radius: int) -> UInt8[np.ndarray, "K K"]:
    """The neighbours that must be free for a seed: full pixels of its mask, one off the centre as published."""
    element = np.zeros((2 * radius + 1, 2 * radius + 1), np.uint8)
    _raise_to(element, (mask == 255).astype(np.uint8), radius + 1, radius + 1)
    return element


def _raise_to(array: np.ndarray, stamp: np.ndarray, row: int, column: int) -> None:
    """In place: array = max(array, stamp centred on a point), clipped at the border."""
    half = len(stamp) // 2
    top, left, size = row - half, column - half, len(array)
    rows, columns = min(len(stamp), size - top), min(len(stamp), size - left)
    window = array[max(top, 0) : top + rows, max(left, 0) : left + columns]
    np.maximum(window, stamp[max(-top, 0) : rows, max(-left, 0) : columns], out=window)


def _shrink(canvas: UInt8[np.ndarray, "A A"], size: int) -> UInt8[np.ndarray, "S S"]:
    return np.asarray(Image.fromarray(canvas).resize((size, size), Image.Resampling.LANCZOS))


def _vector(direction: float, distance: float) -> tuple[float, float]:
    # math.sin, since the last digits of numpy's sines differ between processors.
    return distance * math.sin(direction), distance * math.cos(direction)


def _reversed(direction: float) -> float:
    return direction + math.pi if direction < 0 else direction - math.pi


def go(start: Point, vector: tuple[float, float]) -> Point:
    """Moves along a vector to whole pixels, rounded up.

    As published, values that are whole up to the rounding error of a sine are rounded up as well. That happens near the
    upper and left borders, where floats are finer: in the uppermost 8 rows, a move to the left is also a pixel down.
    Without it, hard pictures of 32x32 need 276 attempts instead of 312.
    """
    return math.ceil(start[0] + vector[0]), math.ceil(start[1] + vector[1])


def _circle(radius: int) -> Int[np.ndarray, "P 2"]:
    """The pixels of a circle around a pixel, as (row, column) offsets."""
    angles = np.deg2rad(np.arange(0, 360, 360 / (2 * np.pi * radius)))
    exact = radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return np.unique(np.floor(exact.round(9)).astype(int), axis=0)


def _disk(radius: int) -> UInt8[np.ndarray, "K K"]:
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares <= radius**2).astype(np.uint8)


@lru_cache(maxsize=16)
def _frame(size: int, width: int) -> UInt8[np.ndarray, "R R"]:
    """255 on the outermost `width` pixels of a picture, 0 inside."""
    inside = np.zeros((max(size - 2 * width, 0),) * 2, np.uint8)
    return np.pad(inside, (size - len(inside)) // 2, constant_values=255)


def _padded(image: UInt8[np.ndarray, "R R"], pad: int, value: int) -> Int[np.ndarray, "W W"]:
    return np.pad(image.astype(np.int16), pad, constant_values=value)
