"""Reporting of a run: a metrics file, trackers, and the console."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.common import terminal
from experiments.common.errors import UserError
from experiments.common.terminal import printable
from experiments.training.trackers import Trackers
from seqboat.version import metric_today

METRICS_FILE = "metrics.jsonl"

WALL_CLOCK_FIELDS = ("seconds", "elements_per_second")
"""Fields that differ between two equal runs: leave them out when comparing metrics files."""

Values = Mapping[str, float | Sequence[float]]


class MetricsFile:
    """JSON lines: {"step": 20, "kind": "train", "loss": 0.7, "activation_rate": [0.43, 0.12], ...}

    Always valid JSON: NaN and infinities are written as null, which pandas and numpy read as NaN. Every line is one
    write to a file opened for appending, so a killed run leaves at most a truncated last line.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; `record` holds `step`, `kind` and values (numbers, strings, arrays, lists of numbers).

        Raises UserError if the disk is full or the file cannot be written.
        """
        line = json.dumps({name: plain(value) for name, value in record.items()}, allow_nan=False) + "\n"
        self._write(line.encode())

    def check(self) -> None:
        """Raises UserError if the file cannot be written."""
        self._write(b"")

    def _write(self, data: bytes) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                written = file.write(data)
        except OSError as error:
            raise UserError(f"could not write to {self.path}: {error.strerror}") from error
        if written != len(data):
            raise UserError(
                f"could not write to {self.path}: the disk is full; free some space and run the same command again"
            )

    def records(self) -> Iterator[dict]:
        """The lines of the file as dicts, in order; truncated and foreign lines are skipped with a warning."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = _parse(line)
                if record is None:
                    logging.warning("%s: line %d is truncated or not a record; skipped", self.path, number)
                else:
                    yield {metric_today(name): value for name, value in record.items()}

    def truncate_after(self, step: int) -> set[int]:
        """Truncates the file to the records up to and including `step`, where a run resumes, and returns their steps.
        Atomic."""
        kept: set[int] = set()
        if not self.path.exists():
            return kept
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with partial.open("w") as file:
                for record in self.records():
                    if record["step"] <= step:
                        file.write(json.dumps(record) + "\n")
                        kept.add(record["step"])
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            raise UserError(f"could not rewrite {self.path}: {error.strerror}") from error
        return kept


class Reporter:
    """Reports a run to `workdir` and standard output, on process 0 only.

    `trackers` are those of `config.train.trackers`, given the `config`. `start_step` is the step resumed from: records
    after it are removed from the metrics file, and each tracker's run continues. 0 is a new run, with new records.
    `reported` is a lower bound on the last step with a record; a file without it is continued with a warning. A
    terminal shows a progress bar below the printed lines; elsewhere every report is one plain line. `console` is for
    notebooks and tests.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        start_step: int,
        process_index: int,
        trackers: tuple[str, ...] = (),
        config: Mapping[str, Any] = {},
        reported: int = 0,
        console: Console | None = None,
    ):
        self._primary = process_index == 0
        self._progress: Progress | None = None
        if not self._primary:
            return
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None
        workdir = Path(workdir).absolute()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write in {workdir}: {error.strerror}") from error
        self._metrics = MetricsFile(workdir / METRICS_FILE)
        kept = self._metrics.truncate_after(start_step or -1)
        self._metrics.check()
        if reported and not {1, reported} <= kept:
            text = "%s lacks records of the steps up to %d; continuing without them"
            logging.warning(text, self._metrics.path, reported)
        history = ((record["step"], scalars(record)) for record in self._metrics.records())
        self._trackers = Trackers(trackers, workdir, start_step, config, history)
        self._console = console or terminal.console()
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)
            self._progress.start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(self, step: int, values: Values) -> None:
        """Reports training values at `step`. The console shows loss, accuracy, throughput and activation rates."""
        if not self._primary:
            return
        self._record({"step": step, "kind": "train", **values})
        text = _summary(values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self._print(f"step {step}/{self._total_steps}  {text}{self._remaining(step)}")

    def evaluation(self, step: int, split: str, values: Values) -> None:
        """Reports values on a full split at `step`; prints all but matrices and `elements`."""
        if not self._primary:
            return
        self._record({"step": step, "kind": "evaluation", "split": split, **values})
        self._print(
            f"step {step}/{self._total_steps}  {split}  "
            + "  ".join(_item(*item) for item in values.items() if item[0] != "elements" and np.ndim(item[1]) < 2)
        )

    def message(self, text: str) -> None:
        """Prints a line."""
        if self._primary:
            self._print(text)

    def progress(self, step: int) -> None:
        """Advances the progress bar; cheap enough for every step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Ends the bar and flushes the trackers."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._primary:
            self._trackers.close()

    def _record(self, record: Mapping[str, Any]) -> None:
        self._metrics.append(record)
        self._trackers.log(record["step"], scalars(record))

    def _print(self, text: str) -> None:
        if self._progress is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(printable(text), file=self._console.file, flush=True)

    def _remaining(self, step: int) -> str:
        """The remaining time, from the second report on, since the first includes compilation."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return ""
        seconds = (now - self._first[1]) / (step - self._first[0]) * (self._total_steps - step)
        return f"  eta {timedelta(seconds=round(seconds))}"


def _parse(line: bytes) -> dict | None:
    """A record, or None for a truncated line or one that is not a JSON object with a step."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 2**62 else None


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, those of a list by layer, as trackers get them; matrices are left out."""
    prefix = f"{record['split']}/" if "split" in record else ""
    found: dict[str, float] = {}
    for name, value in record.items():
        if name in ("step", "kind", "split"):
            continue
        numbers = np.asarray(value, float)  # null, which is not finite, is NaN
        if numbers.ndim == 1:
            found |= {f"{prefix}{name}/layer_{layer}": number for layer, number in enumerate(numbers.tolist())}
        elif numbers.ndim == 0:
            found[f"{prefix}{name}"] = float(numbers)
    return found


def plain(value: Any) -> Any:
    """A JSON value: arrays and scalars as lists and numbers, null for values that are not finite."""
    value = np.asarray(value).tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary(values: Values) -> str:
    names = ("loss", "accuracy", "elements_per_second", "activation_rate")
    return "  ".join(_item(name, values[name]) for name in names if name in values)


def _item(name: str, value: float | Sequence[float]) -> str:
    """`loss 0.6931`, `act 0.43 0.12`, `elements/s 12,345`."""
    if name == "elements_per_second":
        return f"elements/s {float(np.asarray(value)):,.0f}"
    if np.ndim(value):
        numbers = " ".join(f"{number:.2f}" for number in np.ravel(value).tolist())
        return f"{'act' if name == 'activation_rate' else name} {numbers}"
    return f"{name} {float(np.asarray(value)):.4g}"
