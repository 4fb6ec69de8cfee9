"""Checkpoints that are atomic, sealed by checksums, and rejected with a clear error if they do not fit.

    DIR/<step>/state/...      the arrays, written by orbax
    DIR/<step>/meta/metadata  JSON: config, versions, format number
    DIR/<step>/seal.json      sha256 and size of every file of the two above, and the metrics of the step
    DIR/damaged/<step>-<n>    quarantined steps that failed their seal: kept for their owner, never read again
    DIR/.lock                 the process that writes here, while it does

The seal is written inside orbax's temporary directory, so the rename that commits a step also commits its seal: a
committed step is always sealed, and old steps are deleted only afterwards. Orbax has no checksums of its own: a flipped
byte in a chunk would silently restore as wrong numbers. Nor does it verify what it wrote: every array is opened once
before the seal is written.
"""

import dataclasses
import errno
import itertools
import logging as python_logging
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.training import manifest, saved_arrays
from experiments.training.claims import Claim
from seqboat.version import CHECKPOINT_FORMAT, migrate

_DAMAGED = "damaged"
_NOTHING, _REFUSED = -1, -2  # sent by process 0 to the others instead of a step
_CALLS = itertools.count(1)
# Orbax treats brackets and the like in a path as a glob, and tensorstore a backslash as a slash.
_MISREAD = re.compile(r"[][*?\\]")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def step_folders(directory: Path) -> list[int]:
    """Steps with a folder, sealed or not, oldest first."""
    names = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name, re.ASCII))


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint: `step`, `state` (the requested tree), `meta` (migrated to the current format)."""

    step: int
    state: Any
    meta: dict


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the last `keep` and the best by `best_metric` kept.

    Every process of a run makes the same calls; process 0 seals, verifies and quarantines, and the others follow it.
    From `with`, or the first save, until `close` the directory is locked for this run (`experiments.training.claims`).
    `read_only` is for evaluation and for other people's runs: nothing is created, cleaned up or quarantined, so it is
    safe while the run that owns the directory is training. Raises UserError for a directory that cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        best_metric: str | None = None,
        higher_is_better: bool = True,
        read_only: bool = False,
    ):
        if keep < 1:
            raise UserError(f"checkpoints to keep: {keep} given, at least 1 expected")
        self.directory = user_path(directory, "checkpoints").absolute()
        self._keep, self._read_only = keep, read_only
        self.rank_by(best_metric, higher_is_better)
        self._manager: ocp.CheckpointManager | None = None
        self._claimed = False
        self._claim: Claim | None = None  # on process 0
        self._sound: set[int] = set()  # verified steps: none is hashed twice
        self._alias: Path | None = None
        self._doubted: set[int] = set()  # reported as having no score
        self._saving: tuple[int, dict] = (-1, {})
        self._scores: dict[int, float] = {}
        logging.get_absl_logger().addFilter(_quiet_orbax)
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"the checkpoint directory {self.directory} is a file: choose another directory")
        if read_only:
            if not self.directory.exists():
                raise UserError(f"there is no checkpoint directory {self.directory}: {_runs_below(self.directory)}")
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.directory).close()
        except OSError as error:
            raise UserError(f"cannot write checkpoints in {self.directory}: {error.strerror}") from error

    def __enter__(self) -> "Checkpoints":
        self._own()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # keep raising the current exception

    def steps(self) -> list[int]:
        """Committed steps, oldest first. Excludes a save in progress until `wait`."""
        return [step for step in self._folders() if (self._folder(step) / manifest.SEAL).is_file()]

    def rank_by(self, best_metric: str | None, higher_is_better: bool) -> None:
        """Sets the metric that selects the best step from now on."""
        self._metric, self._sign = best_metric, 1 if higher_is_better else -1

    def best_step(self) -> int | None:
        """The first step with the best finite value of `best_metric`, or None if no step has one.

        A step with a damaged seal has no score; a warning says once that it may be the best.
        """
        return _first_best({step: self._saved_score(step) for step in self._folders()})

    def save(self, step: int, state: Any, meta: dict, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts saving `state` (any tree of arrays); returns False if this step is already saved.

        `meta` is JSON: config and versions. Raises UserError if the previous save failed, a newer step exists, or
        `metrics` lacks the metric that selects the best step.
        """
        self.wait()
        if self._ask_process_0(lambda: self._to_save(step)) == _NOTHING:
            return False
        if metrics is not None and self._metric is not None and self._metric not in metrics:
            raise UserError(f"the best checkpoint is selected by {self._metric!r}; the metrics are {sorted(metrics)}")
        meta = {**meta, "format": "seqboat", "format_version": CHECKPOINT_FORMAT}
        values = {name: float(value) for name, value in (metrics or {}).items()}
        self._saving = (step, {name: value if math.isfinite(value) else None for name, value in values.items()})
        manager = self._writer()
        self._scores[step] = self._score(self._saving[1])
        with self._save_errors():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            manager.save(step, args=items, force=True)
        return True

    def wait(self) -> None:
        """Waits until the save in progress is committed and sealed. Raises UserError if it failed."""
        if self._manager is not None:
            with self._save_errors():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress, then releases threads and directory. Raises UserError if that save failed."""
        try:
            self._close_manager()
        finally:
            self._claimed = False
            if self._claim is not None:
                self._claim.release()
                self._claim = None

    def _close_manager(self) -> None:
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def reached_preemption(self) -> bool:
        """Whether all processes must save at this step and stop; False if jax.distributed is not initialised.

        Every process calls it at every step.
        """
        # A count of this process's calls, not the step: a signal between two runs must stop the second, whose steps
        # start at 1 again.
        return self._writer().reached_preemption(next(_CALLS))

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """Restores the newest step with an intact seal, or None if nothing was ever saved.

        `abstract_state` has the expected tree, shapes, dtypes and shardings. Damaged steps are quarantined with a
        warning. Raises UserError if no usable step is left, or if the step does not fit `abstract_state` (it stays).
        """
        step = self._newest_usable()
        return None if step is None else self._restore(step, abstract_state, partial=False)

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Restores one step. Raises UserError if it is missing, damaged (it is not moved) or does not fit."""
        return self._restore(self.usable(step), abstract_state, partial=False)

    def restore_params(self, step: int | None, abstract_params: Any, abstract_batch_stats: Any = None) -> Restored:
        """Restores only `params`, and optionally `batch_stats`, of a saved state; step None is the newest.

        The result's `state` is a dict with these keys. The rest of the saved state is neither read nor compared.
        """
        wanted = {"params": abstract_params}
        if abstract_batch_stats is not None:
            wanted["batch_stats"] = abstract_batch_stats
        return self._restore(self.usable(step), wanted, partial=True)

    def read_meta(self, step: int | None = None) -> dict:
        """The meta dictionary of one step, migrated to the current format; None is the newest usable step."""
        return self._meta(self.usable(step))

    def glance(self, step: int | None = None) -> dict:
        """The same without reading the arrays: verifies only the seal and the dictionary's file."""
        steps = reversed(self._folders()) if step is None else [step]
        sound = (step for step in steps if step in self._folders() and not self._problem(step, arrays=False))
        found = next(sound, None)
        return self.read_meta(step) if found is None else self._meta(found)

    def _folders(self) -> list[int]:
        """Steps with a folder, sealed or not, oldest first."""
        return step_folders(self.directory)

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _name(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self.directory}"

    def _score(self, metrics: Any) -> float:
        """The score, greater is better; NaN if `best_metric` is missing or not finite."""
        value = metrics.get(self._metric) if isinstance(metrics, dict) else None
        return self._sign * value if isinstance(value, float) and math.isfinite(value) else math.nan

    def _saved_score(self, step: int) -> float:
        try:
            return self._score(manifest.metrics(self._folder(step), step))
        except (OSError, ValueError) as error:
            if step not in self._doubted:
                logging.warning("%s has no score (%s): it may be the best one", self._name(step), error)
            self._doubted.add(step)
            return math.nan

    def _problem(self, step: int, *, arrays: bool = True) -> str | None:
        """The defect of a step, or None. Raises UserError for a step not written by seqboat."""
        if step in self._sound:
            return None
        problem = manifest.problem(self._folder(step), step, arrays=arrays)
        if arrays and problem is None:
            self._sound.add(step)
        return problem

    def _own(self) -> None:
        """Locks the directory for this run. Raises UserError if another run has it."""
        if not (self._claimed or self._read_only):
            self._ask_process_0(self._own_here)
            self._claimed = True

    def _own_here(self) -> int:
        self._claim = Claim(self.directory)
        return _NOTHING

    def _known_to_orbax(self) -> Path:
        """The directory under a name that orbax takes literally: a symbolic link if its own name would be misread."""
        if not _MISREAD.search(str(self.directory)):
            return self.directory
        if self._alias is None:
            place = tempfile.mkdtemp(prefix="seqboat-")
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            if _MISREAD.search(place):
                raise UserError(f"TMPDIR={place}: must not contain the characters []*?\\ ; set another")
            self._alias = Path(place, "checkpoints")
            self._alias.symlink_to(self.directory)
        return self._alias

    def _writer(self) -> ocp.CheckpointManager:
        """Orbax's manager, created on first use, after quarantining steps that would mislead its deletion policy."""
        if self._read_only:
            raise ValueError(f"the checkpoints in {self.directory} were opened read_only")
        self._own()
        if self._manager is None:
            self._ask_process_0(self._quarantine_misleading)
            self._scores = {step: self._saved_score(step) for step in self.steps()}
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(self._keep), _KeepBest(self._scores)]),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # orbax's own metadata files may be damaged
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            )
            self._manager = ocp.CheckpointManager(self._known_to_orbax(), options=options)
        return self._manager

    def _seal(self) -> None:
        """Writes the seal of the step being saved: on process 0, in orbax's thread, after the last file of all hosts
        and before the rename that commits the step. A failure here makes the save fail."""
        step, metrics = self._saving
        (folder,) = self.directory.glob(f"{step}.orbax-checkpoint-tmp*")
        try:
            saved_arrays.open_all(self._known_to_orbax() / folder.name / "state")
        except Exception as error:
            raise _Unreadable(saved_arrays.first_line(error)) from error
        manifest.write(folder, step, metrics)

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turns exceptions of orbax and tensorstore, on a full disk and the like, into one line for the user."""
        try:
            yield
        except Exception as error:
            self._drop_manager()
            step, code = self._saving[0], _os_error(error)
            if code is None and not isinstance(error, _Unreadable):
                raise
            good, reason = self.steps(), os.strerror(code) if code else f"it cannot be read back: {error}"
            raise UserError(
                f"could not save the checkpoint of step {step} to {self.directory}: {reason}; "
                + (f"the last good checkpoint is step {good[-1]}; " if good else "there is no earlier checkpoint; ")
                + ("free some space" if code in _FULL else "fix the cause")
                + " and run the same command again"
            ) from error

    def _drop_manager(self) -> None:
        """Releases the threads after a failed save and clears its error: the next save lists the steps anew."""
        manager, self._manager = self._manager, None
        for _ in range(2):  # an error may be pending in several places, and each close raises the next
            with suppress(Exception):
                manager and manager.close()

    def _newest_usable(self) -> int | None:
        self._close_manager()  # it lists the steps anew on next use
        step = self._ask_process_0(self._find_newest)
        return None if step == _NOTHING else step

    def usable(self, step: int | None) -> int:
        """The step, or the newest, with its seal verified. Raises UserError."""
        if step is None:
            step = self._newest_usable()
            if step is None:
                raise UserError(f"there is no checkpoint in {self.directory} yet")
            return step
        self.wait()
        return self._ask_process_0(lambda: self._verified(step))

    def _ask_process_0(self, find: Callable[[], int]) -> int:
        """Broadcasts the result of `find` on process 0, which alone reads, hashes and moves steps."""
        step, refusal = _REFUSED, None
        if jax.process_index() == 0:
            try:
                step = find()
            except UserError as error:
                refusal = error
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == _REFUSED:
            raise refusal or UserError(f"process 0 rejected the checkpoints in {self.directory}; its message says why")
        return step

    def _to_save(self, step: int) -> int:
        """The step, or _NOTHING if it is already saved. Raises UserError if a later one exists."""
        newest = max(self._folders(), default=-1)
        if step <= newest and step not in self.steps():
            raise UserError(
                f"cannot save step {step}: {self.directory} already holds step {newest}; "
                "continue from that step or choose another directory"
            )
        return step if step > newest else _NOTHING

    def _verified(self, step: int) -> int:
        if step not in self._folders():
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}; there are {self.steps()}")
        if problem := self._problem(step):
            raise UserError(f"{self._name(step)} is damaged: {problem}; use another step")
        return step

    def _find_newest(self) -> int:
        """The newest step with an intact seal, or _NOTHING; quarantines damaged steps after it."""
        damaged, usable = [], _NOTHING
        for step in reversed(self._folders()):
            problem = self._problem(step)
            if problem is None:
                usable = step
                break
            damaged.append(f"step {step} ({problem})")
            if not self._read_only:
                self._quarantine(step)
        if damaged:
            text = f"damaged checkpoints in {self.directory}: {', '.join(damaged)}"
            text += "" if self._read_only else f", moved to its folder {_DAMAGED}/"
            if usable == _NOTHING:
                raise UserError(f"{text}; no usable checkpoint is left: restore a copy, or start in another directory")
            logging.warning("%s; using step %d instead", text, usable)
        elif usable == _NOTHING:
            self._refuse_other_content()
        return usable

    def _quarantine_misleading(self) -> int:
        """Damage must not decide which steps are deleted: quarantines steps without a readable score, and a best step
        that cannot be read."""
        for step in self._folders():
            self._quarantine_if(step, self._problem(step, arrays=False))
        while (best := self.best_step()) is not None and self._quarantine_if(best, self._problem(best)):
            pass
        return _NOTHING

    def _quarantine_if(self, step: int, problem: str | None) -> bool:
        if problem is not None:
            self._quarantine(step)
            text = "%s is damaged (%s) and was moved to the folder %s/: it may be the best one"
            logging.warning(text, self._name(step), problem, _DAMAGED)
        return problem is not None

    def _quarantine(self, step: int) -> None:
        (self.directory / _DAMAGED).mkdir(exist_ok=True)
        names = (self.directory / _DAMAGED / f"{step}-{n}" for n in itertools.count())
        with nullcontext() if self._claimed else Claim(self.directory):
            self._folder(step).rename(next(name for name in names if not name.exists()))

    def _refuse_other_content(self) -> None:
        """A directory without steps starts a new run, unless it has other content or all its steps were damaged."""
        names = {path.name for path in self.directory.iterdir() if not path.name.startswith(".")}
        if _DAMAGED in names:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged and in its folder {_DAMAGED}/: "
                "restore a copy, or remove that folder to start over"
            )
        names = {name for name in names if ".orbax-checkpoint-tmp" not in name}
        if names:
            raise UserError(
                f"{self.directory} contains no seqboat checkpoints but other files ({', '.join(sorted(names)[:3])}): "
                "choose another directory"
            )

    def _meta(self, step: int) -> dict:
        try:
            return migrate(manifest.read_json(self._folder(step) / manifest.META))
        except (OSError, ValueError) as error:
            raise UserError(f"{self._name(step)} cannot be read: {error}; use another step") from error

    def _restore(self, step: int, wanted: Any, *, partial: bool) -> Restored:
        meta, saved = self._meta(step), self._known_to_orbax() / str(step) / "state"
        return Restored(step, saved_arrays.read(saved, wanted, self._name(step), partial=partial), meta)


def _runs_below(directory: Path) -> str:
    """What to do about missing checkpoints: name the runs inside, as a sweep and several seeds have them."""
    workdir = directory.parent
    below = [*workdir.glob(f"*/{directory.name}"), *workdir.glob(f"*/*/{directory.name}")]
    runs = sorted(str(path.parent.relative_to(workdir)) for path in below)
    return f"name one of the runs in it, {', '.join(runs[:5])}" if runs else "was this run ever started?"


class _Unreadable(Exception):
    """A checkpoint that was just written cannot be opened."""


@dataclasses.dataclass
class _KeepBest:
    """Orbax's policy for keeping the best step. Its own BestN keeps the last of ties, not the first, and ranks NaN."""

    scores: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = _first_best({info.step: self.scores.get(info.step, math.nan) for info in checkpoints})
        return [info.step == best for info in checkpoints]


def _first_best(scores: dict[int, float]) -> int | None:
    """The lowest step with the greatest score; NaN is not a score."""
    ranked = [(score, -step) for step, score in scores.items() if not math.isnan(score)]
    return -max(ranked)[1] if ranked else None


def _os_error(error: BaseException | None) -> int | None:
    """The errno behind an exception; tensorstore raises ValueError with the number in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(code[1])
        error = error.__cause__ or error.__context__
    return None


def _quiet_orbax(record: python_logging.LogRecord) -> bool:
    """Drops orbax's progress lines, its tracebacks of exceptions that it also raises, and its "preemption sync point",
    which counts calls, whereas our own line counts steps."""
    loud = record.levelno >= python_logging.WARNING and not record.exc_info and "sync point" not in str(record.msg)
    return loud or f"{os.sep}orbax{os.sep}" not in record.pathname
