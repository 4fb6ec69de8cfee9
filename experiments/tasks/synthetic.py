"""Generated sequences with slots: elements at which something is asked."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.common.config import at_most, within
from experiments.data.sources import Generated
from experiments.tasks.base import MAX_SIZE, TokenTask


@dataclasses.dataclass(frozen=True)
class SlotConfig:
    """Numbers of examples and the seed to generate them from; the order of training examples uses the run's seed."""

    train_examples: int = 1_000_000
    test_examples: int = 2048
    data_seed: int = at_most(2**63 - 1, default=0)

    def __post_init__(self):
        within(self, 1, MAX_SIZE, "train_examples", "test_examples")
        if self.data_seed < 0:
            raise ValueError(f"data_seed={self.data_seed}: must not be negative")


def letter(index: int) -> str:
    """Text to display a symbol of an alphabet: a letter, or its number beyond z."""
    return f"{chr(ord('a') + index) if index < 26 else index} "


Example = tuple[np.ndarray, np.ndarray]  # ids, and the target of each where something is asked, else 0


class SlotTask(TokenTask):
    """Generated sequences with slots to be answered; the loss is on the slots alone."""

    selection_metric = "accuracy"
    higher_is_better = True

    def __init__(self, config: Any, chance: float, **batching: int):
        """`chance` is the accuracy of the baseline; `batching` as in Task."""
        self.config, self._chance = config, chance
        sizes = {"train": config.train_examples, "validation": config.test_examples, "test": config.test_examples}
        sources = {
            split: Generated(self.drawing(split), config.data_seed, number, size)
            for number, (split, size) in enumerate(sizes.items())
        }
        super().__init__(config, sources, **batching)

    def draw(self, rng: np.random.Generator) -> Example:
        """Draws the ids and targets of one example."""
        raise NotImplementedError

    def drawing(self, split: str) -> Callable[[np.random.Generator], Example]:
        """What draws the examples of a split; the same for all of them by default."""
        return self.draw

    def row(self, example: Example) -> dict[str, Any]:
        inputs, targets = example
        return {
            "inputs": inputs.astype(np.int32),
            "lengths": np.int32(len(inputs)),
            "targets": targets.astype(np.int32),
            "weights": (targets > 0).astype(np.float32),
        }

    def baseline(self, split: str) -> dict[str, float]:
        self._evaluation_source(split)  # rejects an unknown split
        return {"accuracy": self._chance}
