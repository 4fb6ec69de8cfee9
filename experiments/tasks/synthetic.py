"""Generated sequences whose last elements are slots to be answered."""

import dataclasses
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


class SlotTask(TokenTask):
    """Generated sequences whose last elements are slots to be answered; the loss is on the slots alone."""

    selection_metric = "accuracy"
    higher_is_better = True

    def __init__(self, config: Any, chance: float, **batching: int):
        """`chance` is the accuracy of the baseline; `batching` as in Task."""
        self._chance = chance
        sizes = {"train": config.train_examples, "validation": config.test_examples, "test": config.test_examples}
        sources = {
            split: Generated(self.draw, config.data_seed, number, size)
            for number, (split, size) in enumerate(sizes.items())
        }
        super().__init__(config, sources, **batching)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws the ids of one example, and the answers of its last elements."""
        raise NotImplementedError

    def row(self, example: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        inputs, answers = example
        before = len(inputs) - len(answers)
        return {
            "inputs": inputs.astype(np.int32),
            "lengths": np.int32(len(inputs)),
            "targets": np.concatenate([np.zeros(before), answers]).astype(np.int32),
            "weights": np.concatenate([np.zeros(before), np.ones(len(answers))]).astype(np.float32),
        }

    def baseline(self, split: str) -> dict[str, float]:
        self._evaluation_source(split)  # rejects an unknown split
        return {"accuracy": self._chance}
