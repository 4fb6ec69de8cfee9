"""What pretraining without labels is worth, on one data set: classifiers from few labels, and their controls.

By the recipe of `configs/pretrain`, from every seed: an encoder is pretrained on all training inputs, unlabelled, as a
context autoencoder ("cae"), as one without alignment ("align_0"), and as a masked autoencoder ("mae"). A linear probe
of it is fitted on the few labels that the seed draws; so is one of a random encoder, and one of the inputs themselves
("raw_inputs"). "cae_fine_tuned" trains the whole pretrained encoder on the same labels, "from_scratch" a random one.

A probe is logistic regression (scikit-learn, C = 1) on the mean of the encoder's outputs, standardised by the labelled
examples: it has one solution, so that no arm depends on how it is trained. The steps are those of `experiments.train`,
under `jax.vmap` over seeds. The score is the accuracy on the first EVALUATED examples of the test split.
"""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    encoders: dict[str, Tree] = {}
    classifier = Runs(get_config("fine_tune").to_dict(), seeds)
    for arm in arms:
        began, values = time.monotonic(), classifier.values
        if arm in PRETRAINED:
            stage, changes = PRETRAINED[arm]
            config = get_config(stage)
            config.model.update(changes)
            values = config.to_dict()
            encoders[arm] = Runs(values, seeds).train().params
        if arm == "from_scratch" or arm.endswith(TUNED):
            scores = classifier.accuracies(classifier.train(encoders.get(arm.removesuffix(TUNED))))
        else:
            scores = classifier.probe(None if arm == "raw_inputs" else classifier.start(encoders.get(arm)).params)
        found[arm] = row(values, seeds, scores)
        save(found)
        print(f"{arm}: {[round(score, 3) for score in scores]} after {time.monotonic() - began:.0f} s", flush=True)


class Runs:
    """Runs of one config from every seed, in one program."""

    def __init__(self, values: dict[str, Any], seeds: Sequence[int]):
        self.values, self.seeds = values, seeds
        self.experiments: list[Experiment] = [build({**values, "seed": seed}) for seed in seeds]
        functions = self.experiments[0].functions
        self._seeds = jnp.array(seeds, jnp.uint32)
        self._init = jax.jit(jax.vmap(functions.init))
        self._train = jax.jit(jax.vmap(functions.train), donate_argnums=0)
        self._evaluate = jax.jit(jax.vmap(functions.evaluate, (0, None)))
        self._encode = jax.jit(jax.vmap(functools.partial(encode, self.experiments[0].model)))

    def start(self, encoder: Tree | None = None) -> TrainState:
        """The first states, every leaf with an axis of seeds; `encoder` has the SELECTED parameters to start from."""
        state = self._init(self._seeds)
        own = {} if encoder is None else {name: jax.tree.map(jnp.copy, encoder[name]) for name in SELECTED}
        return state.replace(params={**state.params, **own})

    def train(self, encoder: Tree | None = None) -> TrainState:
        """The last states."""
        state = self.start(encoder)
        loaders = [experiment.task.train_batches(0) for experiment in self.experiments]
        for _ in range(self.values["train"]["steps"]):
            state = self._train(state, together(loaders), self._seeds)
        if (state.bad_step >= 0).any():
            raise FloatingPointError(f"a run of {self.values['model']['name']} stopped being finite")
        return state

    def accuracies(self, state: TrainState) -> list[float]:
        """Of every seed."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        sums = [jax.device_get(self._evaluate(variables, batch)["accuracy"]) for batch in self._tested()]
        total = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), sums)
        return means({"accuracy": total})["accuracy"]

    def probe(self, params: Tree | None) -> list[float]:
        """The accuracy of every seed's linear probe, of the inputs themselves without `params`."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        count, size = self.values["task"]["labels"], self.values["train"]["batch_size"]
        loaders = [experiment.task.train_batches(0) for experiment in self.experiments]
        known = self._features(params, [together(loaders) for _ in range(count // size)])
        tests = (
            {name: np.stack([array] * len(self.seeds)) for name, array in batch.items()} for batch in self._tested()
        )
        asked = self._features(params, list(tests))
        fit = lambda x, y: make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, y)
        return [fit(*own).score(*other) for own, other in zip(known, asked, strict=True)]

    def _features(self, params: Tree | None, batches: Sequence[Batch]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Features (N, D) and targets (N,) of every seed."""
        parts = []
        for batch in batches:
            inputs, lengths = batch["inputs"], batch["lengths"]
            x = inputs.reshape(*inputs.shape[:2], -1) if params is None else self._encode(params, inputs, lengths)
            parts.append((np.asarray(x), batch["targets"], batch["weights"] > 0))
        x, y, real = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
        return [(x[seed][real[seed]], y[seed][real[seed]]) for seed in range(len(self.seeds))]

    def _tested(self) -> Iterator[Batch]:
        batches = self.experiments[0].task.evaluation_batches("test")
        return itertools.islice(batches, -(-EVALUATED // self.values["train"]["batch_size"]))


def together(loaders: Sequence[Iterator[Batch]]) -> Batch:
    """The next batches of all seeds, in one."""
    return jax.tree.map(lambda *rows: np.stack(rows), *map(next, loaders))


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
