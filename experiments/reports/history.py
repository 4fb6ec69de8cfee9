"""The metrics that a run wrote during training."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.training.metrics import METRICS_FILE, MetricsFile


@dataclasses.dataclass(frozen=True)
class History:
    """The records of a metrics file, which may be empty, and the names of the S series, one per layer and module."""

    records: tuple[dict[str, Any], ...]
    names: tuple[str, ...]

    def curve(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (R,), and values (R, 1) or (R, S), NaN where not finite; records without the metric are skipped."""
        rows: list[tuple[int, list[float]]] = []
        for record in self.records:
            if record.get("kind") == kind and record.get(name) is not None:
                try:
                    values = np.array(record[name], float).reshape(-1)
                except (TypeError, ValueError, OverflowError):  # not a line that we wrote
                    continue
                if len(values) in (1, len(self.names)) and (not rows or len(values) == len(rows[0][1])):
                    rows.append((record["step"], values.tolist()))
        steps = np.array([step for step, _ in rows], int)
        return steps, np.array([values for _, values in rows], float).reshape(len(rows), -1 if rows else 1)

    def last_step(self) -> int:
        return max((record["step"] for record in self.records), default=0)


def read_history(workdir: Path, names: Sequence[str]) -> History:
    return History(tuple(MetricsFile(workdir / METRICS_FILE).records()), tuple(names))
