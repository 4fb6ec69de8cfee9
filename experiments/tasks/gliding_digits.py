"""Gliding digits: a handwritten digit moves over a dark board; which way? Generated from the digits of scikit-learn.

It moves by one pixel per frame, right, left, down or up. Frames without their order show the line, not the direction:
a clip backwards is a clip of the opposite class, as likely as itself. So no answer from the set of the frames is above
1 in 2, but for chance, and of clips of one frame none is above 1 in 4. Where a longer clip begins does tell, since a
digit at an edge can only leave it; with `wrap` it begins anywhere, and only the motion tells. The splits share no image
of a digit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.common.config import at_most, within
from experiments.data.sources import Generated
from experiments.tasks import digits
from experiments.tasks.base import MAX_SIZE, ClassificationConfig, ClassificationTask, Logits, Sums
from seqboat.choices import check_choices

DIRECTIONS = ("right", "left", "down", "up")
SIDE = 8  # pixels of a digit
LARGEST = 256  # pixels of a board's side

Example = tuple[np.ndarray, int]  # frames (L, size, size), and the number of the direction


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Clips of `length` frames of `size` x `size` pixels in [0, 1], row by row. `wrap` lets a digit that leaves the
    board come in at the other side. `answer` "clip" asks once, "frame" at every frame. Numbers of examples, and the
    seed to generate them from; the order of training examples uses the run's seed."""

    vocabulary_size: ClassVar[None] = None
    classes: ClassVar[int] = len(DIRECTIONS)
    length: int = 8
    size: int = 16
    wrap: bool = False
    answer: Literal["clip", "frame"] = "clip"
    train_examples: int = 20_000
    test_examples: int = 2_000
    data_seed: int = at_most(2**63 - 1, default=0)

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        within(self, SIDE, LARGEST, "size")
        within(self, 1, MAX_SIZE, "train_examples", "test_examples")
        if self.data_seed < 0:
            raise ValueError(f"data_seed={self.data_seed}: must not be negative")
        if self.length > self.places:
            raise ValueError(
                f"length={self.length}: must be at most {self.places}, the places of a digit on size={self.size} pixels"
            )

    @property
    def places(self) -> int:
        """How many places a digit has along either axis."""
        return self.size if self.wrap else self.size - SIDE + 1

    @property
    def channels(self) -> int:
        return self.size**2


class Task(ClassificationTask):
    """With `answer` "frame", `targets` and `weights` are (B, L): every frame's answer is that of its clip."""

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task. Reads no user files."""
        images = digits.read()[0].reshape(-1, SIDE, SIDE)
        sizes = {"train": config.train_examples, "validation": config.test_examples, "test": config.test_examples}
        sources = {
            split: Generated(_drawing(images[digits.SPLITS[split]], config), config.data_seed, number, size)
            for number, (split, size) in enumerate(sizes.items())
        }
        super().__init__(config, sources, **batching)

    def encode(self, example: Example) -> np.ndarray:
        return example[0].reshape(self.config.length, self.config.channels)

    def label(self, example: Example) -> int:
        return example[1]

    def class_name(self, number: int) -> str:
        return DIRECTIONS[number]

    def row(self, example: Example) -> dict[str, Any]:
        row = super().row(example)
        if self.config.answer == "clip":
            return row
        targets = np.full(self.config.length, row["targets"])
        return row | {"targets": targets, "weights": np.ones(self.config.length, np.float32)}

    def evaluation_metrics(self, output: Logits, batch: Mapping[str, Array]) -> Sums:
        """`confusion` of clips and, of answers for every frame, `clip_accuracy`: a clip's answer is the class with the
        highest mean probability over its frames."""
        if self.config.answer == "clip":
            return super().evaluation_metrics(output, batch)
        weights = batch["weights"]
        chances = jnp.sum(jax.nn.softmax(output.logits.astype(jnp.float32)) * weights[..., None], 1)
        answers, clips = jnp.argmax(chances, -1), jnp.max(weights, 1)
        targets = batch["targets"][:, 0]
        truth = jax.nn.one_hot(targets, self.config.classes) * clips[:, None]
        counts = truth.T @ jax.nn.one_hot(answers, self.config.classes)
        return {
            "clip_accuracy": (jnp.sum(clips * (answers == targets)), jnp.sum(clips)),
            "confusion": (counts, counts.sum(1, keepdims=True)),
        }


def glide(
    image: Float[np.ndarray, "S S"], direction: int, start: int, across: int, length: int, size: int
) -> Float[np.ndarray, "L N N"]:
    """Frames of an image that moves over the places start, start + 1, ... along its line, for "left" and "up" in the
    opposite order, at the place `across` of the other axis. What is beyond an edge is at the other side."""
    board = np.zeros((size, size), np.float32)
    board[: len(image), : len(image)] = image
    places = [int(place) for place in start + np.arange(length)]
    if DIRECTIONS[direction] in ("left", "up"):
        places.reverse()
    rows = DIRECTIONS[direction] in ("down", "up")
    return np.stack([np.roll(board, (place, across) if rows else (across, place), (0, 1)) for place in places])


def _drawing(images: Float[np.ndarray, "n S S"], config: Config) -> Callable[[np.random.Generator], Example]:
    """What draws an example of these images: image, direction and places, all evenly."""
    starts = config.places if config.wrap else config.places - config.length + 1

    def draw(rng: np.random.Generator) -> Example:
        image, direction = images[rng.integers(len(images))], int(rng.integers(len(DIRECTIONS)))
        start, across = int(rng.integers(starts)), int(rng.integers(config.places))
        return glide(image, direction, start, across, config.length, config.size), direction

    return draw
