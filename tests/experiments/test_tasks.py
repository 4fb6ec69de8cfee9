"""Tasks: what a batch holds, the held-out split of Text, losses, and mistakes in their configs."""

import dataclasses
import os
import re
from itertools import islice
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.config import to_dataclass
from experiments.data import listops as expressions
from experiments.data import preparation
from experiments.data.builders.listops import Builder as ListOps
from experiments.errors import UserError
from experiments.tasks import corpus, image, listops, recall, selective_copy, short_listops, speech_commands, text
from experiments.tasks.base import ClassificationTask

FEW = short_listops.Config(train_examples=300, validation_examples=50, test_examples=45)
REVIEWS = {"train": 60, "test": 21}


class FakeReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """imdb_reviews/plain_text with invented reviews, among them an empty one, a long one and two that are equal."""

    name = "imdb_reviews"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain_text", version=tfds.core.Version("1.0.0"))]

    def _info(self):
        label = tfds.features.ClassLabel(names=["neg", "pos"])
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in REVIEWS}

    def _generate_examples(self, split):
        special = {0: "", 1: "é" * 100, 2: "same", 3: "same"}
        for number in range(REVIEWS[split]):
            yield number, {"text": special.get(number, f"{split} review {number}"), "label": int(number >= 20)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data")
    preparation.prepare(FakeReviews(data_dir=path, file_format="array_record"))
    sizes = {"train": 30, "validation": 7, "test": 5}
    preparation.prepare(ListOps(data_dir=path, sizes=sizes))
    return str(path)


@pytest.fixture(scope="module", params=["short_listops", "listops", "text"])
def task(request, data_dir) -> ClassificationTask:
    make = {
        "short_listops": lambda: short_listops.Task(FEW, batch_size=4, seed=0, data_dir=None),
        "listops": lambda: listops.Task(listops.Config(), batch_size=4, seed=0, data_dir=data_dir),
        "text": lambda: text.Task(text.Config(length=50), batch_size=4, seed=0, data_dir=data_dir),
    }
    return make[request.param]()


def check_batch(task: ClassificationTask, batch: dict[str, np.ndarray]) -> None:
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "inputs": ((4, task.config.length), np.int32),
        "lengths": ((4,), np.int32),
        "targets": ((4,), np.int32),
        "weights": ((4,), np.float32),
    }
    inside = np.arange(task.config.length) < batch["lengths"][:, None]
    assert np.all((batch["inputs"] > 0) == inside), "ids up to the length, padding behind it"
    assert batch["inputs"].max() < task.config.vocabulary_size
    assert np.all((batch["targets"] >= 0) & (batch["targets"] < task.config.classes))
    assert np.all(batch["lengths"][batch["weights"] == 0] == 0)


def test_batches(task):
    for step, batch in enumerate(islice(task.train_batches(2), 5), 2):
        check_batch(task, batch)
        assert np.all(batch["weights"] == 1)
        for name, value in task.train_batch(step).items():
            np.testing.assert_array_equal(batch[name], value)
    for split in task.splits:
        batches = list(task.evaluation_batches(split))
        for batch in batches:
            check_batch(task, batch)
        assert [batch["weights"].sum() for batch in batches[:-1]] == [4] * (len(batches) - 1)


def test_the_trivial_baseline_is_the_share_of_the_commonest_class(task):
    for split in task.splits:
        batches = list(task.evaluation_batches(split))
        targets = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
        assert task.trivial(split) == {"accuracy": pytest.approx(np.bincount(targets).max() / len(targets))}


def test_an_unknown_split_is_an_error(task):
    for ask in (task.trivial, task.evaluation_batches):
        with pytest.raises(UserError, match="no evaluation split 'dev'; this task has: validation, test"):
            ask("dev")


def test_loss_and_metrics_leave_rows_of_weight_0_out():
    task = short_listops.Task(FEW, batch_size=4, seed=0)
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    targets = np.array([logits[0].argmax(), (logits[1].argmax() + 1) % 10, logits[2].argmax(), logits[3].argmax()])
    batch = {"targets": jnp.asarray(targets), "weights": jnp.array([1.0, 1.0, 1.0, 0.0])}
    loss_sum, weight_sum, metrics = task.loss(SimpleNamespace(logits=jnp.asarray(logits)), batch)

    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(probabilities[np.arange(3), targets[:3]]).sum()
    np.testing.assert_allclose(loss_sum, expected, rtol=1e-5)
    assert float(weight_sum) == 3
    assert {name: (float(total), float(weight)) for name, (total, weight) in metrics.items()} == {
        "loss": (float(loss_sum), 3.0),
        "accuracy": (2.0, 3.0),
    }


def test_the_labels_of_short_listops_are_the_values_of_its_inputs():
    task = short_listops.Task(FEW, batch_size=5, seed=0)
    found = set()
    for batch in [*task.evaluation_batches("test"), *(task.train_batch(step) for step in range(60))]:
        for inputs, length, target in zip(batch["inputs"], batch["lengths"], batch["targets"], strict=True):
            tokens = inputs[:length].tolist()
            assert 8 <= length <= 64
            assert expressions.evaluate(tokens) == target
            found.add(tuple(tokens))
    assert len(found) == 345, "all of train and test, nothing in both"


def test_what_each_field_of_short_listops_changes():
    tasks = {
        name: short_listops.Task(dataclasses.replace(FEW, **{name: value}), batch_size=300, seed=0)
        for name, value in {
            "train_examples": 299,
            "validation_examples": 49,
            "test_examples": 44,
            "data_seed": 1,
        }.items()
    }
    base = short_listops.Task(FEW, batch_size=300, seed=0)

    def sizes(task):
        return [int(next(task.evaluation_batches(split))["weights"].sum()) for split in task.splits]

    assert sizes(base) == [50, 45]
    assert sizes(tasks["validation_examples"]) == [49, 45]
    assert sizes(tasks["test_examples"]) == [50, 44]
    for name in ("train_examples", "data_seed"):
        assert np.any(tasks[name].train_batch(0)["inputs"] != base.train_batch(0)["inputs"])


def reviews(task: ClassificationTask, split: str) -> list[bytes]:
    """The texts of a split, from its batches."""
    batches = task.evaluation_batches(split) if split != "train" else (task.train_batch(step) for step in range(54))
    return sorted(
        bytes((inputs[:length] - 1).astype(np.uint8))
        for batch in batches
        for inputs, length, weight in zip(batch["inputs"], batch["lengths"], batch["weights"], strict=True)
        if weight
    )


def make_text(data_dir: str, seed: int = 0, **config) -> text.Task:
    return text.Task(text.Config(**config), batch_size=1, seed=seed, data_dir=data_dir)


def test_text_holds_out_a_tenth_of_each_class(data_dir):
    task = make_text(data_dir, length=300)
    validation, train, test = (reviews(task, split) for split in ("validation", "train", "test"))
    assert [len(validation), len(train), len(test)] == [6, 54, 21]
    assert not set(validation) & set(train)
    assert [int(batch["targets"][0]) for batch in task.evaluation_batches("validation")].count(0) == 2
    assert "é".encode() * 100 in train + validation
    assert b"" in train + validation
    assert (train + validation).count(b"same") == 2


def test_the_held_out_part_depends_on_its_own_seed_and_on_the_texts_alone(data_dir):
    held_out = reviews(make_text(data_dir, length=300), "validation")
    assert reviews(make_text(data_dir, length=300, seed=5), "validation") == held_out
    assert reviews(make_text(data_dir, length=300, validation_seed=1), "validation") != held_out
    assert len(reviews(make_text(data_dir, length=300, validation_fraction=0.5), "validation")) == 30

    examples = [{"text": str(number).encode(), "label": number % 2} for number in range(200)]
    backwards = examples[::-1]
    _, forth = text.split_by_content(examples, 0.1, 0)
    _, back = text.split_by_content(backwards, 0.1, 0)
    assert {examples[index]["text"] for index in forth} == {backwards[index]["text"] for index in back}
    assert len(forth) == 20


def test_text_is_cut_to_the_length(data_dir):
    task = make_text(data_dir, length=7)
    assert task.train_batch(0)["inputs"].shape == (1, 7)
    assert max(len(review) for review in reviews(task, "test")) == 7


@pytest.mark.parametrize(
    ("module", "field", "value"),
    [
        (text, "length", 0),
        (text, "validation_fraction", 0.0),
        (text, "validation_fraction", 1.0),
        (text, "validation_seed", -1),
        (listops, "length", 0),
        (short_listops, "train_examples", 0),
        (short_listops, "validation_examples", 2_000_000),
        (short_listops, "test_examples", -1),
        (short_listops, "data_seed", -1),
        (image, "deviation", 0.0),
        (speech_commands, "words", 12),
        (selective_copy, "symbols", 0),
        (selective_copy, "length", 7),
        (recall, "keys", 7),
        (recall, "length", 15),
        (recall, "data_seed", -1),
        (corpus, "length", 0),
        (corpus, "context", 8192),
        (corpus, "evaluation_bytes", 0),
        (corpus, "fractions", (0.5, 0.5, 0.5)),
    ],
)
def test_mistakes_in_a_config_are_named(module, field, value):
    with pytest.raises(UserError, match=re.escape(f"config.task.{field}={value}: must ")):
        to_dataclass(module.Config, {field: value}, "config.task")


def test_tasks_say_which_data_are_missing(tmp_path):
    for module, name in ((listops, "listops"), (text, "imdb_reviews/plain_text")):
        with pytest.raises(UserError, match=f"data set '{name}' is not in {tmp_path}"):
            module.Task(module.Config(), batch_size=1, seed=0, data_dir=str(tmp_path))


@pytest.mark.skipif("SEQBOAT_DATA_DIR" not in os.environ, reason="SEQBOAT_DATA_DIR names no directory with IMDB")
def test_text_on_imdb():
    task = text.Task(text.Config(), batch_size=50, seed=0, data_dir=os.environ["SEQBOAT_DATA_DIR"])
    sums = {split: np.zeros(4) for split in task.splits}
    for split in task.splits:
        for batch in task.evaluation_batches(split):
            weights, lengths = batch["weights"], batch["lengths"]
            positive = weights * batch["targets"]
            sums[split] += [weights.sum(), positive.sum(), (weights * lengths).sum(), lengths.max() <= 4000]
    assert sums["validation"][:2].tolist() == [2500, 1250]
    assert sums["test"][:2].tolist() == [25000, 12500]
    assert [sums["validation"][3], sums["test"][3]] == [50, 500]
    assert 1100 < sums["test"][2] / 25000 < 1325  # bytes; the whole reviews have 1325 in train
    assert task.trivial("validation") == {"accuracy": 0.5}
    assert task.train_batch(0)["inputs"].shape == (50, 4000)
