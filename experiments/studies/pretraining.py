"""What pretraining without labels is worth, on one data set: classifiers from few labels, and their controls.

By the recipe of `configs/pretrain`, from every seed: an encoder is pretrained on all training inputs, unlabelled, as a
context autoencoder ("cae"), as one without alignment ("align_0"), and as a masked autoencoder ("mae"). A linear probe
of it is fitted on the few labels that the seed draws; so is one of a random encoder, and one of the inputs themselves
("raw_inputs"). "cae_fine_tuned" trains the whole pretrained encoder on the same labels, "from_scratch" a random one.

A probe is logistic regression (scikit-learn, C = 1) on the mean of the encoder's outputs, standardised by the labelled
examples: it has one solution, so that no arm depends on how it is trained. The steps are those of `experiments.train`.
The score is the accuracy on the first EVALUATED examples of the test split.
"""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.errors import UserError
from experiments.common.spread import spread
from experiments.data.sources import Batch
from experiments.training.experiment import Experiment, build
from experiments.training.step import TrainState, means

Tree = Any
EVALUATED = 2000
# What starts as it is in the pretrained model.
SELECTED = ("embedding", "position", "encoder")
# The stage of the recipe, and what differs in its model.
PRETRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "cae": ("pretrain", {}),
    "align_0": ("pretrain", {"align": 0.0}),
    "mae": ("mae", {}),
}
TUNED = "_fine_tuned"


def compare(recipe: str, arms: Sequence[str], save: Callable[[dict[str, Any]], None], *, seeds: range) -> None:
    """Measures the arms in this order, a pretrained one before it is fine-tuned, and saves a table of
    `experiments.evaluation.table`'s form after each."""
    if importlib.util.find_spec("sklearn") is None:  # said before anything is trained
        raise UserError("linear probes are scikit-learn's: pip install scikit-learn")
    get_config = importlib.import_module(f"configs.pretrain.{recipe}").get_config
    found: dict[str, Any] = {}
    encoders: dict[str, list[Tree]] = {}
    classifier = Runs(get_config("fine_tune").to_dict(), seeds)
    for arm in arms:
        began, values = time.monotonic(), classifier.values
        if arm in PRETRAINED:
            stage, changes = PRETRAINED[arm]
            config = get_config(stage)
            config.model.update(changes)
            values = config.to_dict()
            encoders[arm] = [state.params for state in Runs(values, seeds).train()]
        if arm == "from_scratch" or arm.endswith(TUNED):
            scores = classifier.accuracies(classifier.train(encoders.get(arm.removesuffix(TUNED))))
        else:
            started = [] if arm == "raw_inputs" else classifier.start(encoders.get(arm))
            scores = classifier.probe([state.params for state in started] or None)
        found[arm] = row(values, seeds, scores)
        save(found)
        print(f"{arm}: {[round(score, 3) for score in scores]} after {time.monotonic() - began:.0f} s", flush=True)


class Runs:
    """Runs of one config from every seed, one after the other: under `vmap` loops of unknown length copy all that they
    change, and a step takes up to four times as long."""

    def __init__(self, values: dict[str, Any], seeds: Sequence[int]):
        self.values, self.seeds = values, seeds
        self.experiments: list[Experiment] = [build({**values, "seed": seed}) for seed in seeds]
        functions = self.experiments[0].functions
        self._init, self._evaluate = jax.jit(functions.init), jax.jit(functions.evaluate)
        self._train = jax.jit(functions.train, donate_argnums=0)
        self._encode = jax.jit(functools.partial(encode, self.experiments[0].model))

    def start(self, encoders: Sequence[Tree] | None = None) -> list[TrainState]:
        """The first state of every seed; `encoders` have the SELECTED parameters to start from."""
        states = [self._init(np.uint32(seed)) for seed in self.seeds]
        if encoders is None:
            return states
        own = ({name: jax.tree.map(jnp.copy, encoder[name]) for name in SELECTED} for encoder in encoders)
        return [state.replace(params={**state.params, **each}) for state, each in zip(states, own, strict=True)]

    def train(self, encoders: Sequence[Tree] | None = None) -> list[TrainState]:
        """The last states."""
        return [self._trained(*run) for run in zip(self.start(encoders), self.experiments, self.seeds, strict=True)]

    def _trained(self, state: TrainState, experiment: Experiment, seed: int) -> TrainState:
        for batch in itertools.islice(experiment.task.train_batches(0), self.values["train"]["steps"]):
            state = self._train(state, batch, np.uint32(seed))
        if state.bad_step >= 0:
            raise FloatingPointError(f"seed {seed} of {self.values['model']['name']} stopped being finite")
        return state

    def accuracies(self, states: Sequence[TrainState]) -> list[float]:
        """Of every seed."""
        return [self._accuracy({"params": state.params, "batch_stats": state.batch_stats}) for state in states]

    def _accuracy(self, variables: Tree) -> float:
        sums = (jax.device_get(self._evaluate(variables, batch)["accuracy"]) for batch in self._tested())
        return means({"accuracy": functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), sums)})["accuracy"]

    def probe(self, params: Sequence[Tree] | None) -> list[float]:
        """The accuracy of every seed's linear probe, of the inputs themselves without `params`."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        batches, scores = self.values["task"]["labels"] // self.values["train"]["batch_size"], []
        for experiment, own in zip(self.experiments, params or [None] * len(self.seeds), strict=True):
            known = self._features(own, itertools.islice(experiment.task.train_batches(0), batches))
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(*known)
            scores.append(model.score(*self._features(own, self._tested())))
        return scores

    def _features(self, params: Tree | None, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) and targets (N,)."""
        x, y = [], []
        for batch in batches:
            inputs, real = batch["inputs"], batch["weights"] > 0
            features = (
                inputs.reshape(len(inputs), -1) if params is None else self._encode(params, inputs, batch["lengths"])
            )
            x.append(np.asarray(features)[real])
            y.append(batch["targets"][real])
        return np.concatenate(x), np.concatenate(y)

    def _tested(self) -> Iterator[Batch]:
        batches = self.experiments[0].task.evaluation_batches("test")
        return itertools.islice(batches, -(-EVALUATED // self.values["train"]["batch_size"]))


def encode(model: Any, params: Mapping[str, Any], inputs: jax.Array, lengths: jax.Array) -> jax.Array:
    """What the linear head of a classifier sees, (B, D): its logits with the identity as head."""
    width = model.config.encoder.layer.features
    identity = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    wide = type(model)(dataclasses.replace(model.config, classes=width))
    return wide.apply({"params": {**params, "head": identity}}, inputs, lengths).logits


def row(values: dict[str, Any], seeds: Sequence[int], accuracies: list[float]) -> dict[str, Any]:
    """An arm of a table of `experiments.evaluation.table`."""
    test = [{"selection_metric": "accuracy"}]
    return {
        "config": values,
        "seeds": list(seeds),
        "metrics": {"accuracy": {"values": accuracies, **spread(accuracies)}},
        "test": test,
    }
