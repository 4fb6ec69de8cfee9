"""The training loop."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.common.config import differences
from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.common.provenance import command, hardware, versions
from experiments.data import identity
from experiments.training import objectives
from experiments.training.checkpoints import Checkpoints, Restored, step_folders
from experiments.training.experiment import Experiment
from experiments.training.metrics import Reporter
from experiments.training.nonfinite import locate
from experiments.training.restore import CHECKPOINTS, initial_variables, refuse_no_source
from experiments.training.step import Sums, TrainState, means


class Finished(NamedTuple):
    """How a training run ended: after `step` steps, all saved; `stopped` if it was asked to stop, even at its last."""

    step: int
    stopped: bool


def train(
    experiment: Experiment,
    workdir: str | Path,
    init_from: str | Path | None = None,
    init_select: Sequence[str] = (),
) -> Finished:
    """Trains to the config's last step, resuming from the newest checkpoint in `workdir` if there is one. Else
    `init_from` gives the initial parameters, all or those that a glob of `init_select` matches.

    A run that is stopped anywhere and resumed gives the same parameters and metrics, bit for bit, as an uninterrupted
    one: batches and dropout are functions of the step, and the sums of metrics are part of the state.
    """
    workdir = user_path(workdir, "workdir")
    task, settings = experiment.task, experiment.config.train
    source = source_of(workdir, init_from)
    experiment = objectives.attach(experiment, workdir / CHECKPOINTS)
    # Detects config errors before anything is written.
    abstract = experiment.partition.abstract(experiment.functions.init, experiment.seed)
    variables = {} if source is None else initial_variables(experiment, source, init_select)  # and errors of the source
    with Checkpoints(
        workdir / CHECKPOINTS,
        keep=settings.keep_checkpoints,
        best_metric=task.selection_metric,
        higher_is_better=task.higher_is_better,
    ) as checkpoints:
        restored = checkpoints.restore_latest(abstract)
        if restored:
            _refuse_other_data(restored, experiment)
            _refuse_other_streams(restored, experiment)
        state = restored.state if restored else experiment.partition.create(experiment.functions.init, experiment.seed)
        if restored is None and experiment.functions.objectives:
            variables["frozen"] = {name: made.frozen() for name, made in experiment.functions.objectives.items()}
        if restored is None and variables:
            state = experiment.partition.put_state(dataclasses.replace(state, **variables))
        start = int(state.step)
        with Reporter(
            workdir,
            total_steps=settings.steps,
            start_step=start,
            reported=_reported(restored),
            trackers=settings.trackers,
            config=experiment.values,
            process_index=jax.process_index(),
        ) as reporter:
            reporter.message(experiment.describe())
            count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            reporter.message(f"{count:,} parameters on {experiment.partition.describe()} ({jax.devices()[0].platform})")
            if restored:
                reporter.message(f"resuming from step {start} of {checkpoints.directory}")
                for line in differences(restored.meta.get("config"), experiment.values):
                    reporter.message(f"changed since that checkpoint: {line}")
                if changed := identity.changes(restored.meta.get("data"), task):
                    reporter.message(f"changed since that checkpoint: the data, {'; '.join(changed)}")
            return _Run(experiment, checkpoints, reporter, state).train()


def source_of(workdir: str | Path, init_from: str | Path | None) -> Path | None:
    """The source of initial parameters of a run in `workdir`: None if it resumes from its own checkpoint or starts from
    scratch. Raises UserError for a path that cannot hold parameters."""
    if init_from is None or step_folders(user_path(workdir, "workdir") / CHECKPOINTS):
        return None
    source = user_path(init_from, "--init_from")
    refuse_no_source(source)
    return source


def _reported(restored: Restored | None) -> int:
    """A lower bound on the last step that the resumed run reported; 0 if unknown."""
    config = restored.meta.get("config") if restored else None
    every = config.get("train", {}).get("log_every") if isinstance(config, dict) else None
    if restored is None or not isinstance(every, int) or every < 1:
        return 0
    return restored.step - restored.step % every or min(1, restored.step)


def _refuse_other_data(restored: Restored, experiment: Experiment) -> None:
    """Raises UserError if the data have changed of a run that only its own can continue."""
    if experiment.task.fixed_data and (changed := identity.changes(restored.meta.get("data"), experiment.task)):
        raise UserError(f"{changed[0]}: resume with what this run began with, or start in another directory")


def _refuse_other_streams(restored: Restored, experiment: Experiment) -> None:
    """The stream state belongs to the text before the step's batch: raises UserError if that batch has changed."""
    old, new = ((config or {}).get("task", {}) for config in (restored.meta.get("config"), experiment.values))
    for name in ("length", "fractions", "dataset") if restored.state.streams else ():
        if name in old and (changed := differences(old[name], new[name], f"config.task.{name}")):
            raise UserError(
                f"{changed[0]}: this changes where each stream starts, so the saved stream state no longer matches; "
                "restore the old value, or use only the parameters by --init_from"
            )
    if restored.state.streams and (changed := identity.changes(restored.meta.get("data"), experiment.task)):
        raise UserError(
            f"{changed[0]}: the saved stream state belongs to a different text; resume with that text, or use only the "
            "parameters by --init_from"
        )


class _Run:
    """One process's run from a step to the last."""

    def __init__(self, experiment: Experiment, checkpoints: Checkpoints, reporter: Reporter, state: TrainState):
        self.experiment, self.checkpoints, self.reporter, self.state = experiment, checkpoints, reporter, state
        self.settings, self.task = experiment.config.train, experiment.task
        self.partition = experiment.partition
        self.evaluate_batch = self.partition.evaluate(experiment.functions.evaluate)
        self.read_batch = self.partition.evaluate(experiment.functions.evaluate_stream)
        # A pending report is fetched only after the next step is dispatched, so that the device does not wait for the
        # host.
        self.due: tuple[int, Sums, jax.Array] | None = None
        self.clock = time.monotonic()
        # Elements in a checkpoint's sums, which this process has not timed.
        self.counted = float(state.metrics["elements"][0])

    def train(self) -> Finished:
        start, settings = int(self.state.step), self.settings
        if start >= settings.steps:
            self.reporter.message(f"step {start} of {settings.steps}: nothing left to train")
            if start == 0:
                self.save(0, None)
            return Finished(start, stopped=False)
        if self.checkpoints.reached_preemption():  # between two runs of one process, or during start-up
            self.reporter.message(f"asked to stop before step {start + 1}; run the same command to resume")
            return Finished(start, stopped=True)
        update = self.compile(self.partition.put(self.task.train_batch(start)))
        batches = self.task.train_batches(start)
        for step in range(start + 1, settings.steps + 1):
            self.state = update(self.state, self.partition.put(next(batches)), self.experiment.seed)
            self.report()
            self.reporter.progress(step)
            last = step == settings.steps
            if last or step == 1 or step % settings.log_every == 0:
                self.due = (step, self.state.metrics, jnp.copy(self.state.bad_step))
                self.state = dataclasses.replace(self.state, metrics=jax.tree.map(jnp.zeros_like, self.state.metrics))
            stop = self.checkpoints.reached_preemption()
            metrics = self.evaluate(step) if last or step % settings.evaluate_every == 0 else None
            if last or stop or step % settings.checkpoint_every == 0:
                self.save(step, metrics)
            if stop and not last:
                self.checkpoints.wait()
                self.reporter.message(f"asked to stop: saved step {step}; run the same command to resume")
                return Finished(step, stopped=True)
        self.checkpoints.wait()
        best = self.checkpoints.best_step()
        self.reporter.message(f"done: step {settings.steps}" + (f", best step {best}" if best is not None else ""))
        return Finished(settings.steps, stop)

    def compile(self, batch: Any) -> Any:
        began = time.monotonic()
        update = self.partition.compile(self.experiment.functions.train, self.state, batch, self.experiment.seed)
        self.clock = time.monotonic()
        self.reporter.message(f"compiled the training step in {self.clock - began:.1f} s")
        return update

    def report(self) -> None:
        """Fetch and report the pending sums, which are those of finished steps."""
        if self.due is None:
            return
        (step, metrics, bad_step), self.due = self.due, None
        if bad_step >= 0:
            self.stop()
        values = means(metrics)
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        elements, self.counted = float(metrics["elements"][0]) - self.counted, 0.0
        values |= {"elements_per_second": elements / seconds, "seconds": seconds}
        self.reporter.train(step, values)

    def stop(self) -> None:
        """Raise UserError saying where a value stopped being finite. The state is that before the bad step; checkpoints
        stay."""
        self.checkpoints.wait()
        step = int(self.state.bad_step) + 1  # as in reports, where the first step is 1
        alone = jax.process_count() == 1  # otherwise no process has the whole batch
        where = locate(self.experiment, self.state) if alone else "run one process on one device to find out where"
        good = self.checkpoints.steps()
        raise UserError(
            f"the loss, its gradient or the update stopped being finite at step {step}: {where}; "
            + (f"the last good checkpoint is step {good[-1]}; " if good else "there is no checkpoint yet; ")
            + "a lower config.optimizer.learning_rate or clip_norm may help"
        )

    def evaluate(self, step: int) -> dict[str, Any]:
        self.report()
        if self.state.bad_step >= 0:
            self.stop()
        began = time.monotonic()
        split = self.task.splits[0]
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}
        if self.state.streams:  # a model trained on streams is validated on streams
            examine, batches = self.one_pass(), self.task.streams(split, self.settings.batch_size)
        else:
            examine, batches = self.evaluate_batch, self.task.evaluation_batches(split)
        values = evaluate(examine, variables, map(self.partition.put, batches))
        self.reporter.evaluation(step, split, values)
        self.clock += time.monotonic() - began
        return values

    def one_pass(self) -> Any:
        """An evaluation step that continues every batch from the state after the previous one."""
        # Placed like the training state's streams, and so like a step's result, or the step would be compiled twice.
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state.streams)
        state = jax.jit(lambda streams: jax.tree.map(jnp.zeros_like, streams), out_shardings=places)(self.state.streams)

        def evaluate_batch(variables, batch):
            nonlocal state
            sums, state = self.read_batch(variables, {**batch, "streams": state})
            return sums

        return evaluate_batch

    def save(self, step: int, metrics: dict[str, Any] | None) -> None:
        self.report()
        if self.state.bad_step >= 0:
            self.stop()
        meta = {"config": self.experiment.values, "versions": versions(), "hardware": hardware(), "command": command()}
        meta["data"] = identity.remember(self.task)
        if made := self.experiment.functions.objectives:
            meta[objectives.META] = {name: objective.remember() for name, objective in made.items()}
        selection_metric = self.task.selection_metric
        self.checkpoints.save(
            step, self.state, meta, None if metrics is None else {selection_metric: metrics[selection_metric]}
        )


def evaluate(evaluate_batch: Any, variables: Any, batches: Iterator[Any]) -> dict[str, Any]:
    """Exact means over a full split."""
    total: Sums | None = None
    for batch in batches:
        sums = evaluate_batch(variables, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise UserError("the split is empty: there is nothing to evaluate")
    return means(total)
