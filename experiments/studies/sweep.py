"""Many runs of one table: arms, learning rates and seeds, as `configs/sweeps/*.py` fixes them before the first run."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.common.config import within
from experiments.common.errors import UserError
from experiments.evaluation.seeds import finished, run_seed, run_seeds
from experiments.training.claims import InUse
from experiments.training.experiment import build

# A number that is never drawn for the runs of a table, so that they are not those by which a rate was chosen.
FIRST_TUNING_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Every arm is a config. Each is trained from `seeds` seeds, from `first_seed`, and tested.

    With several `learning_rates`, each arm first takes the one with the best mean validation score over `tuning_seeds`
    other seeds.
    """

    arms: dict
    first_seed: int = 0
    seeds: int = 5
    learning_rates: tuple[float, ...] = ()
    tuning_seeds: int = 2

    def __post_init__(self):
        within(self, 1, FIRST_TUNING_SEED, "seeds", "tuning_seeds")
        within(self, 0, FIRST_TUNING_SEED - self.seeds, "first_seed")
        if not self.arms:
            raise ValueError("arms={}: must have at least one")
        for name in self.arms:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"arms.{name}: letters, digits and underscores only, since it names a directory")

    def check(self) -> None:
        """Builds every arm, so that a mistake in one of them is found before the first run. Raises UserError."""
        for name, values in self.arms.items():
            try:
                build(values)
            except UserError as error:
                raise UserError(f"arm {name}: {error}") from error


def run(sweep: Sweep, workdir: Path) -> dict[str, Path] | None:
    """Trains and tests what is not done yet, in WORKDIR/ARM/seed_N; the directory of each arm, or None while another
    process works on some of the runs. Raises Stopped if asked to stop.

    Several processes may share a work directory: each takes runs that no other has.
    """
    rates: dict[str, float | None] = dict.fromkeys(sweep.arms)
    if len(sweep.learning_rates) > 1:
        if _work(_tuning_runs(sweep, workdir), "validation"):
            return None
        rates = {name: _best_rate(sweep, name, workdir) for name in sweep.arms}
    elif sweep.learning_rates:
        rates = dict.fromkeys(sweep.arms, sweep.learning_rates[0])
    configs = {name: _with_rate(values, rates[name]) for name, values in sweep.arms.items()}
    seeds = range(sweep.first_seed, sweep.first_seed + sweep.seeds)
    # Seed by seed, so that an interrupted sweep has all arms of some seeds.
    tests = (({**configs[name], "seed": seed}, workdir / name / f"seed_{seed}") for seed in seeds for name in configs)
    if _work(tests, "test"):
        return None
    for name, values in configs.items():
        run_seeds({**values, "seed": sweep.first_seed}, workdir / name, sweep.seeds)
    return {name: workdir / name for name in configs}


def _work(runs: Iterator[tuple[dict[str, Any], Path]], split: str) -> bool:
    """Does the runs; True if other processes are still at work on some."""
    elsewhere = []
    for values, directory in runs:
        try:
            run_seed(values, directory, split)
        except InUse:
            elsewhere.append((values, directory))
    return not all(finished(values, directory, split) for values, directory in elsewhere)


def _tuning_runs(sweep: Sweep, workdir: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + sweep.tuning_seeds):
        for name, values in sweep.arms.items():
            for rate in sweep.learning_rates:
                yield {**_with_rate(values, rate), "seed": seed}, _tuning_directory(workdir, name, rate, seed)


def _tuning_directory(workdir: Path, name: str, rate: float, seed: int) -> Path:
    return workdir / name / f"rate_{rate:g}" / f"seed_{seed}"


def _best_rate(sweep: Sweep, name: str, workdir: Path) -> float:
    """The learning rate with the best mean validation score."""
    scores = {}
    for rate in sweep.learning_rates:
        found = []
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + sweep.tuning_seeds):
            directory = _tuning_directory(workdir, name, rate, seed)
            result = finished({**sweep.arms[name], "seed": seed}, directory, "validation")
            found.append(result[result["selection_metric"]] if result else None)
        known = [score for score in found if score is not None]
        if len(known) == len(found):  # a run that is not finite has no score
            scores[rate] = sum(known) / len(known)
    if not scores:
        raise UserError(f"arm {name}: no learning rate of {sweep.learning_rates} gave finite scores")
    task: Any = build(sweep.arms[name]).task
    return (max if task.higher_is_better else min)(scores, key=scores.__getitem__)


def _with_rate(values: dict[str, Any], rate: float | None) -> dict[str, Any]:
    return values if rate is None else {**values, "optimizer": {**values["optimizer"], "learning_rate": rate}}
