"""TokFSM: walks through a random finite state machine, every state written as two digits (Tamkin et al. 2023, arXiv
2310.17230, section 4). Generated on read.

The true state of every element is known. States share their digits, and with the default sizes there are more of them
than channels: what tells them apart are combinations.

The machine is drawn from the seed of the data. One successor of every state makes a random cycle through all states,
so that every state reaches every other; the rest are any other states.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.common.config import within
from experiments.tasks.base import MAX_DRAWN, Logits, Scalar, Sums
from experiments.tasks.synthetic import SlotConfig, SlotTask

BEGIN, FIRST_DIGIT, BASE = 1, 2, 10  # 0 is padding
_NO_STATE = -1
_MACHINE = 3  # of the seed: the splits have 0, 1, 2


@dataclass(frozen=True)
class Config(SlotConfig):
    """A walk of `length` symbols, the first of which is the begin symbol, through `states` of `edges` successors each,
    all equally likely."""

    vocabulary_size = FIRST_DIGIT + BASE
    states: int = 100
    edges: int = 5
    length: int = 64

    def __post_init__(self):
        super().__post_init__()
        within(self, 2, BASE**2, "states")
        within(self, 1, self.states, "edges")
        within(self, 4, MAX_DRAWN, "length")
        if self.length % 2:
            raise ValueError(f"length={self.length}: must be even, since every state has two digits")


class Task(SlotTask):
    """Batches also have `states` (B, L) int32, the last state whose two digits have been read, -1 before the first, and
    `legal` (B, L) int32, whose bit d says whether the digit d may follow.

    The first state is drawn from all of them, and its digits are not asked for. Metrics, read off the logits without
    sampling:

        transition   the mean over transitions of the probability of legal first digits times that of legal second
                     digits, given the true first one
        legal        the mean probability of a legal digit
        loss         its minimum is ln(edges) / 2, as the second digit is known once the successor is
    """

    selection_metric = "transition"
    baseline_name = "any digit"

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        self.successors = machine(config)
        self._legal = legal_digits(self.successors)
        super().__init__(config, chance=float("nan"), **batching)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The ids (L,) and the states (L / 2,) of a walk; the last state is not read, only asked for."""
        config = self.config
        walk = [int(rng.integers(config.states))]
        for edge in rng.integers(config.edges, size=config.length // 2 - 1):
            walk.append(int(self.successors[walk[-1], edge]))
        states = np.array(walk)
        return np.concatenate([[BEGIN], FIRST_DIGIT + np.stack(np.divmod(states, BASE), 1).reshape(-1)]), states

    def row(self, example: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        symbols, walk = example
        finished = np.concatenate([[_NO_STATE], walk[:-1]]).repeat(2)
        legal = np.zeros(len(finished), np.int32)
        legal[2::2] = self._legal[0][walk[:-1]]
        legal[3::2] = self._legal[1][walk[:-1], symbols[3:-1:2] - FIRST_DIGIT]
        targets = symbols[1:] * (finished >= 0)
        row = super().row((symbols[:-1], targets))
        return row | {"states": finished.astype(np.int32), "legal": legal}

    def truth(self, batch: Mapping[str, Any]) -> dict[str, Int[np.ndarray, "B L"]]:
        """What is known of every element: `state`, the last one that has been read, -1 before the first."""
        return {"state": np.asarray(batch["states"])}

    def loss(self, output: Logits, batch: Mapping[str, Array]) -> tuple[Scalar, Scalar, Sums]:
        total, weight, metrics = super().loss(output, batch)
        digits = jax.nn.softmax(output.logits.astype(jnp.float32), axis=-1)[..., FIRST_DIGIT:]
        may = jnp.stack([batch["legal"] >> digit & 1 for digit in range(BASE)], axis=-1)
        mass, weights = (digits * may).sum(-1), batch["weights"]
        pairs = lambda a: a.reshape(len(a), -1, 2).prod(-1)
        found = {
            "transition": ((pairs(mass) * pairs(weights)).sum(), pairs(weights).sum()),
            "legal": ((mass * weights).sum(), weight),
        }
        return total, weight, {"loss": metrics["loss"], **found}

    def baseline(self, split: str) -> dict[str, float]:
        """The mean of the product of the shares of digits that are legal."""
        source = self._evaluation_source(split)
        rows = (self.row(source[index]) for index in range(len(source)))
        shares = [np.bitwise_count(row["legal"][2:]) / BASE for row in rows]
        return {"transition": float(np.mean([share.reshape(-1, 2).prod(1) for share in shares]))}

    def symbol(self, number: int) -> str:
        """Digits are digits, and an arrow is the begin symbol."""
        return "→ " if number == BEGIN else f"{number - FIRST_DIGIT} "


def machine(config: Config) -> Int[np.ndarray, "states edges"]:
    """The successors of every state, all different."""
    return random_successors(np.random.default_rng((config.data_seed, _MACHINE)), config.states, config.edges)


def random_successors(rng: np.random.Generator, states: int, edges: int) -> Int[np.ndarray, "states edges"]:
    """Different successors of every state, the first of which make a cycle through all states."""
    cycle = rng.permutation(states)
    successors = np.empty((states, edges), int)
    successors[cycle, 0] = np.roll(cycle, -1)
    for state, first in enumerate(successors[:, 0].tolist()):
        others = np.delete(np.arange(states), first)
        successors[state, 1:] = rng.choice(others, edges - 1, replace=False)
    return successors


def legal_digits(successors: Int[np.ndarray, "S edges"]) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, "S 10"]]:
    """Which digits may follow a state, and a state and the first digit of its successor: bit d for the digit d."""
    first, second = np.divmod(successors, BASE)
    firsts, seconds = np.zeros(len(successors), np.int32), np.zeros((len(successors), BASE), np.int32)
    state = np.arange(len(successors))
    for a, b in zip(first.T, second.T, strict=True):
        firsts |= 1 << a
        seconds[state, a] |= 1 << b
    return firsts, seconds
