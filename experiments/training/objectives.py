"""Objectives: terms of the loss that span layers, or need another network. A file of `experiments/objectives` has

    Config                      its fields, of `config.objectives.NAME`
    Objective(config, experiment, remembered)

An objective has `taps`, whether it reads the model's (`seqboat.layers.taps`), and

    remember()                  JSON for the checkpoints, which gives `remembered` when the run is resumed; else None
    abstract()                  the shapes of what is never trained, a tree; `TrainState.frozen` carries it
    frozen()                    the same with its numbers; only called at the start of a run
    __call__(frozen, params, out, taps, batch, key, step) -> {name: (coefficient, sum, weight)}

The loss is  mean loss + sum of coefficient * sum / weight.  Objectives act in training only. On a mesh each device
computes its own sum / weight, and the loss has their mean, weighted like the targets.
"""

from dataclasses import replace
from pathlib import Path

from experiments.training.checkpoints import Checkpoints, step_folders
from experiments.training.experiment import Experiment, read_objectives

META = "objectives"  # of a checkpoint's meta


def attach(experiment: Experiment, checkpoints: Path) -> Experiment:
    """The experiment with the objectives of its config, as the newest checkpoint remembers them. Raises UserError."""
    found = read_objectives(experiment.config)
    if not found:
        return experiment
    resumed = bool(step_folders(checkpoints))
    known = Checkpoints(checkpoints, read_only=True).glance().get(META, {}) if resumed else {}
    made = {name: module.Objective(config, experiment, known.get(name)) for name, (module, config) in found.items()}
    return replace(experiment, functions=replace(experiment.functions, objectives=made))
