"""Rows of numbers and ids, from examples of text, pictures and sound."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from experiments.common.errors import require
from experiments.data.sources import Source

BYTE_VOCABULARY = 257  # bytes are shifted by one, 0 is padding: LRA's ByteTextEncoder


def pad(values: np.ndarray, length: int) -> tuple[np.ndarray, np.int32]:
    """A sequence cut or zero-padded to `length`, int32 or float32, and its true length."""
    kept = values[:length]
    padded = np.zeros((length, *values.shape[1:]), np.float32 if values.dtype.kind == "f" else np.int32)
    padded[: len(kept)] = kept
    return padded, np.int32(len(kept))


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """Pictures as sequences of one number per pixel."""

    vocabulary_size: ClassVar[None] = None
    channels: ClassVar[int] = 1
    mean: float
    std: float

    def __post_init__(self):
        if not 0 < self.std < math.inf:
            raise ValueError(f"std={self.std}: must be above 0 and finite")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean}: must be finite")


def pixels(image: np.ndarray, config: PixelConfig) -> Float[np.ndarray, "L 1"]:
    """A picture of 0..255, row by row, as  (p / 255 - mean) / std."""
    values = image.reshape(-1, 1).astype(np.float32) / np.float32(255)
    return (values - np.float32(config.mean)) / np.float32(config.std)


@dataclasses.dataclass(frozen=True)
class Standard:
    """Standardisation to mean 0 and standard deviation 1 over a whole source."""

    mean: float
    std: float

    @classmethod
    def of(cls, source: Source, field: str) -> "Standard":
        """Computes exact statistics in float64 over all numbers of a field; reads the source once."""
        count = total = squares = 0.0
        for index in range(len(source)):
            values = np.asarray(source[index][field], np.float64)
            count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
        require(count > 0, f"there is no number of {field!r} in the train split")
        mean = total / count
        std = math.sqrt(max(squares / count - mean**2, 0))
        require(std > 0, f"all numbers of {field!r} in the training data are {mean}: there is nothing to learn")
        return cls(float(mean), std)

    def __call__(self, values: np.ndarray) -> Float[np.ndarray, "L 1"]:
        return ((values[:, None] - self.mean) / self.std).astype(np.float32)


def byte_ids(data: bytes | np.ndarray) -> np.ndarray:
    """Bytes as ids 1..256."""
    return np.frombuffer(data, np.uint8).astype(np.int32) + 1


def byte_symbol(number: int) -> str:
    """The byte of an id if it is printable ASCII, else a dot; a newline is shown and kept."""
    character = chr(number - 1) if number else "∅"
    return "↵\n" if character == "\n" else character if number == 0 or " " <= character <= "~" else "·"
