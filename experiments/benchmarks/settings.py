"""What the flags of the benchmark select, and what every suite does with it: time, profile, refuse what disagrees."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from experiments.benchmarks import contenders
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Race, interleave
from experiments.common.config import with_fields
from experiments.common.errors import UserError

Row = dict[str, Any]
C = TypeVar("C", bound=Case)

# Relative RMS: in float32 on a CPU, and with 16-bit operands or TF32.
AGREEMENT, COARSE_AGREEMENT = 1e-4, 1e-2


@dataclass(frozen=True)
class Changes:
    """What --layer, --batch and --length change in every case."""

    layer: tuple[str, ...] = ()
    batch: int | None = None
    length: int | None = None

    def __call__(self, case: Case) -> Case:
        """The changed case. Raises UserError for an unknown field or a bad value."""
        length = self.length or case.length
        layer = replace(case.layer, max_positions=length) if self.length else case.layer
        layer = with_fields(layer, self.layer, "--layer")
        return Case(layer, self.batch or case.batch, length)


@dataclass(frozen=True)
class Settings:
    """Cases and rates; minimum rounds and seconds per comparison; the published file, and the directory of other
    sources; whether to time the forms with attention everywhere and without, and a transformer layer; what was changed
    in the cases, for suites that start processes or have a case of their own; layers of a model; the directory of a
    profile."""

    cases: Mapping[str, Case]
    rates: tuple[float, ...]
    rounds: int
    seconds: float
    published: Path | None = None
    sources: Path | None = None
    forms: bool = True
    transformer: bool = False
    changes: Changes = field(default_factory=Changes)
    depth: int | None = None
    profile: Path | None = None

    def theirs(self) -> contenders.Published | None:
        return contenders.Published(self.published) if self.published else None

    def race(self, runners: Mapping[Any, Callable[[], object]]) -> Race:
        """Times of the runners, called in turn; then two calls of each under the profiler, if requested."""
        found = interleave(runners, rounds=self.rounds, seconds=self.seconds)
        if self.profile:
            with jax.profiler.trace(str(self.profile)):
                for name, run in runners.items():
                    with jax.profiler.TraceAnnotation(str(name)):
                        run()
                        run()
        return found


def tolerance(dtype: str) -> float:
    """The largest difference of a leaf between implementations with operands of this type."""
    return AGREEMENT if dtype == "float32" and jax.default_backend() == "cpu" else COARSE_AGREEMENT


def agree(what: str, ours: contenders.Runner, theirs: contenders.Runner) -> Row:
    """The leaf that differs most, and by how much, in float32. Raises UserError above `tolerance`."""
    leaf, difference = contenders.disagreement(ours.results(), theirs.results())
    limit = tolerance("float32")
    if not difference <= limit:  # also true for NaN
        raise UserError(
            f"{what}: our {leaf} differs by {difference:.1e} from the reference's, so they are not compared; at most "
            f"{limit:.0e} may differ"
        )
    return {"difference": difference, "worst_leaf": leaf}
