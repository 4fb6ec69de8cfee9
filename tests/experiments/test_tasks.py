"""Tasks: what a batch holds, how data become inputs, held-out splits, losses, and mistakes in their configs."""

import collections
import dataclasses
import gzip
import lzma
import math
import os
import re
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.csgraph
import tensorflow_datasets as tfds

from experiments.common.config import to_dataclass
from experiments.common.errors import UserError
from experiments.data import listops as expressions
from experiments.data import preparation
from experiments.data.builders.listops import Builder as ListOps
from experiments.data.sources import open_split
from experiments.tasks import (
    codes,
    corpus,
    digit_codes,
    digits,
    gliding_digits,
    image,
    induction,
    listops,
    masked,
    mqar,
    parity,
    pathfinder,
    retrieval,
    selective_copy,
    short_listops,
    speech_commands,
    spoken_digit,
    symbol_function,
    text,
    tokfsm,
)
from experiments.tasks.base import ClassificationTask, Task, TokenTask
from tests.helpers import grid

FEW = short_listops.Config(train_examples=300, validation_examples=50, test_examples=45)
GLIDING = gliding_digits.Config(length=3, size=10, train_examples=50, test_examples=10)
# Every task, with a config for tiny data, and the weights of its validation and test splits.
TASKS: dict[str, tuple[Any, Any, list[int]]] = {
    "short_listops": (short_listops, FEW, [50, 45]),
    "listops": (listops, listops.Config(), [7, 5]),
    "text": (text, text.Config(length=50), [6, 21]),
    "image": (image, image.Config(), [2, 5]),
    "pathfinder": (pathfinder, pathfinder.Config(resolution=4), [5, 6]),
    "retrieval": (retrieval, retrieval.Config(length=20), [5, 7]),
    "sc10": (speech_commands, speech_commands.Config(length=30), [7, 5]),
    "sc35": (speech_commands, speech_commands.Config(words=35, length=30), [7, 5]),
    "spoken_digit": (spoken_digit, spoken_digit.Config(length=30), [10, 10]),
    "corpus": (corpus, corpus.Config(dataset="enwik8", length=16, context=10, repeat_distance=9), [50, 84]),
    "selective_copy": (
        selective_copy,
        selective_copy.Config(train_examples=50, test_examples=10, length=12, symbols=3, alphabet=4),
        [30, 30],
    ),
    "mqar": (
        mqar,
        mqar.Config(train_examples=50, test_examples=10, length=16, pairs=3, vocabulary=10),
        [30, 30],
    ),
    "mqar_random_fillers": (
        mqar,
        mqar.Config(
            train_examples=50,
            test_examples=10,
            length=16,
            pairs=3,
            vocabulary=10,
            random_fillers=True,
        ),
        [30, 30],
    ),
    "parity": (parity, parity.Config(train_examples=50, test_examples=10, length=20, test_length=24), [200, 240]),
    "induction": (
        induction,
        induction.Config(train_examples=50, test_examples=10, length=12, alphabet=4),
        [10, 10],
    ),
    "symbol_function": (
        symbol_function,
        symbol_function.Config(train_examples=50, test_examples=10, template="dedupe then count", numbers=(2,)),
        [120, 120],
    ),
    "gliding_digits": (gliding_digits, GLIDING, [10, 10]),
    "gliding_digits_frames": (gliding_digits, dataclasses.replace(GLIDING, answer="frame"), [30, 30]),
    "masked_symbols": (
        masked,
        masked.Config({"name": "short_listops", **dataclasses.asdict(FEW)}, share=0.4),
        [328, 345],
    ),
    "masked_numbers": (masked, masked.Config({"name": "digits", "length": 16, "patches": True}, span=2), [1600, 1600]),
    "codes": (
        codes,
        codes.Config(train_examples=50, test_examples=10, length=8, coarse=5, fine=4, edges=3, choices=2),
        [70, 70],
    ),
    "tokfsm": (tokfsm, tokfsm.Config(train_examples=50, test_examples=10, states=30, edges=3, length=12), [100, 100]),
}
CLASSIFICATION = [name for name, (module, _, _) in TASKS.items() if issubclass(module.Task, ClassificationTask)]


def store(data_dir: Path, dataset: str, features: dict[str, Any], splits: dict[str, list[dict]], ordered=False) -> None:
    """Prepares a data set with these examples, under the name of another."""

    class Fake(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, _, config = dataset.partition("/")
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=ordered
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    preparation.prepare(Fake(data_dir=data_dir, file_format="array_record"))


def reviews_of(split: str, size: int) -> list[dict]:
    """Among them an empty one, a long one and two that are equal."""
    special = {0: "", 1: "é" * 100, 2: "same", 3: "same"}
    return [{"text": special.get(i, f"{split} review {i}"), "label": int(i >= 20)} for i in range(size)]


def store_pictures(data_dir: Path, dataset: str, shape: tuple[int, ...], classes: int, sizes: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    label = tfds.features.ClassLabel(num_classes=classes)
    features = {"image": tfds.features.Tensor(shape=shape, dtype=np.uint8), "label": label}
    draw = lambda: {"image": rng.integers(256, size=shape, dtype=np.uint8), "label": int(rng.integers(classes))}
    store(data_dir, dataset, features, {split: [draw() for _ in range(size)] for split, size in sizes.items()})


def store_recordings(data_dir: Path, dataset: str, splits: dict[str, list[dict]], classes: int) -> None:
    """Of 20 to 40 samples each; the examples bring what else they have."""
    rng = np.random.default_rng(0)
    extra = {"audio/filename": tfds.features.Text()} if dataset == "spoken_digit" else {}
    features = {
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        "label": tfds.features.ClassLabel(num_classes=classes),
        **extra,
    }
    draw = lambda: rng.integers(-900, 1100, size=rng.integers(20, 41)).astype(np.int16)
    store(
        data_dir, dataset, features, {name: [{"audio": draw(), **e} for e in found] for name, found in splits.items()}
    )


def store_blocks(data_dir: Path, dataset: str, sizes: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    features = {"bytes": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")}
    blocks = {
        name: [{"bytes": rng.integers(7, size=size, dtype=np.uint8)} for size in all] for name, all in sizes.items()
    }
    store(data_dir, dataset, features, blocks, ordered=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data")
    label, string = tfds.features.ClassLabel(num_classes=2), tfds.features.Text()
    found = {split: reviews_of(split, size) for split, size in {"train": 60, "test": 21}.items()}
    store(path, "imdb_reviews/plain_text", {"text": string, "label": label}, found)
    sizes = {"train": 30, "validation": 7, "test": 5}
    preparation.prepare(ListOps(data_dir=path, sizes=sizes))
    store_pictures(path, "cifar10", (32, 32, 3), 10, {"train": 20, "test": 5})
    store_pictures(path, "pathfinder/32_hard", (4, 4), 2, {"train": 12, "validation": 5, "test": 6})
    papers = {
        split: [
            {"text1": "a" * (i + 1), "text2": f"{split} {i} cites another paper", "label": i % 2} for i in range(size)
        ]
        for split, size in {"train": 24, "validation": 5, "test": 7}.items()
    }
    store(path, "aan", {"text1": string, "text2": string, "label": label}, papers)
    for words in (10, 35):
        clips = {split: [{"label": i % words} for i in range(size)] for split, size in sizes.items()}
        store_recordings(path, f"speech_commands/sc{words}", clips, words)
    digits = [{"label": d, "audio/filename": f"{d}_ann_b_{i}.wav"} for d in (3, 8) for i in range(13)]
    store_recordings(path, "spoken_digit", {"train": digits}, 10)
    store_blocks(path, "enwik8", {"train": (64, 64, 30), "validation": (50,), "test": (64, 20)})
    return str(path)


def make(name: str, data_dir: str, batch_size: int = 4, seed: int = 0, **batching: int) -> Task:
    module, config, _ = TASKS[name]
    return module.Task(config, batch_size=batch_size, seed=seed, data_dir=data_dir, **batching)


@pytest.fixture(scope="module", params=TASKS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def task(name, data_dir) -> Task:
    return make(name, data_dir)


def check_batch(task: Task, batch: dict[str, np.ndarray], split: str = "train") -> None:
    """Shapes, types and ranges, of ids or numbers, of sequences or pairs of them, with a target each or many."""
    if isinstance(task, masked.Task):
        return check_masked(task, batch)
    config, inputs, lengths = task.config, batch["inputs"], batch["lengths"]
    pairs, numbers = isinstance(task, retrieval.Task), config.vocabulary_size is None
    if isinstance(task, TokenTask):
        length = config.length + getattr(config, "symbols", 0)
        length = config.test_length if split == "test" and hasattr(config, "test_length") else length
        answers, choices = (4, length), config.vocabulary_size
    else:
        answers = (4, config.length) if getattr(config, "answer", "clip") == "frame" else (4,)
        length, choices = config.length, config.classes
    last = (2,) if pairs else (getattr(config, "channels", 1),) if numbers else ()
    slices = isinstance(task, TokenTask) and task.slices and split != "train"
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "inputs": ((4, length, *last), np.float32 if numbers else np.int32),
        "lengths": ((4, 2) if pairs else (4,), np.int32),
        "targets": (answers, np.int32),
        "weights": (answers, np.float32),
        **({"slices": (answers, np.int32)} if slices else {}),
        **({name: (answers, np.int32) for name in ("states", "legal")} if isinstance(task, tokfsm.Task) else {}),
    }
    inside = np.arange(length)[:, None] < lengths[:, None] if pairs else np.arange(length) < lengths[:, None]
    assert np.all(inputs[~inside] == 0)
    if not numbers:
        streams = isinstance(task, corpus.Task)  # begin with a 0
        assert np.all((inputs > 0)[:, streams:] == inside[:, streams:]), "ids up to the length, padding behind it"
        assert inputs.max() < config.vocabulary_size
    assert np.all((batch["targets"] >= 0) & (batch["targets"] < choices))
    filling = ~batch["weights"].reshape(4, -1).any(1)
    assert np.all(lengths[filling] == 0)
    assert set(np.unique(batch["weights"])) <= {0.0, 1.0}


def check_masked(task: masked.Task, batch: dict[str, np.ndarray]) -> None:
    """What is there, and a mask of the share of every sequence, rounded down."""
    inputs, lengths, targets, weights = (batch[name] for name in ("inputs", "lengths", "targets", "weights"))
    symbols = task.config.vocabulary_size is not None
    assert inputs.dtype == (np.int32 if symbols else np.float32)
    assert inputs.shape == (*targets.shape[:2], 2 if symbols else 5)
    np.testing.assert_array_equal(inputs[..., :-1], targets[..., None] if symbols else targets)
    np.testing.assert_array_equal(inputs[..., -1], weights)
    assert weights.sum(1).tolist() == np.floor(task.config.share * lengths).tolist()
    assert not weights[np.arange(weights.shape[1]) >= lengths[:, None]].any()


def test_batches(name, task):
    for step, batch in enumerate(islice(task.train_batches(2), 5), 2):
        check_batch(task, batch)
        assert batch["weights"].reshape(4, -1).any(1).all()
        for key, value in task.train_batch(step).items():
            np.testing.assert_array_equal(batch[key], value)
    for split, weight in zip(task.splits, TASKS[name][2], strict=True):
        batches = list(task.evaluation_batches(split))
        for batch in batches:
            check_batch(task, batch, split)
        filled = [batch["weights"].reshape(4, -1).any(1).sum() for batch in batches]
        assert filled[:-1] == [4] * (len(batches) - 1)
        assert sum(batch["weights"].sum() for batch in batches) == weight


# One task of each way to make batches, of which the others are cases; test_sources.py: the files that others read.
@pytest.mark.parametrize(
    "name", grid(tuple(TASKS), "short_listops", "text", "corpus", "mqar", "masked_symbols"), scope="module"
)
def test_the_number_of_processes_and_where_training_starts_change_no_batch(name, task, data_dir):
    parts = [make(name, data_dir, process_index=index, process_count=4) for index in range(4)]

    def check(whole, *pieces):
        assert len(whole) > 0
        for batch, *rows in zip(whole, *pieces, strict=True):
            for key, value in batch.items():
                np.testing.assert_array_equal(np.concatenate([row[key] for row in rows]), value)

    late = 7  # in another epoch than the first step, with most of these data
    expected = [task.train_batch(step) for step in range(late, late + 3)]
    check(expected, *(list(islice(part.train_batches(late), 3)) for part in parts))
    for split in task.splits:
        check(list(task.evaluation_batches(split)), *(list(part.evaluation_batches(split)) for part in parts))
    other = make(name, data_dir, seed=1)
    assert any(np.any(other.train_batch(step)["inputs"] != task.train_batch(step)["inputs"]) for step in range(3))


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_the_trivial_baseline_is_the_share_of_the_most_common_class(name, data_dir):
    task = make(name, data_dir)
    for split in task.splits:
        batches = list(task.evaluation_batches(split))
        targets = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
        assert task.baseline(split) == {"accuracy": pytest.approx(np.bincount(targets).max() / len(targets))}


def test_an_unknown_split_is_an_error(task):
    for ask in (task.baseline, task.evaluation_batches):
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


def test_bits_are_nats_over_the_logarithm_of_two(data_dir):
    task = make("corpus", data_dir)
    logits = np.random.default_rng(0).normal(size=(4, 16, 257)).astype(np.float32)
    *_, batch = task.evaluation_batches("test")
    on_device = {key: jnp.asarray(value) for key, value in batch.items()}
    loss_sum, weight_sum, metrics = task.loss(SimpleNamespace(logits=jnp.asarray(logits)), on_device)
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    bits = (np.log2(np.exp(logits.astype(np.float64)).sum(-1)) - chosen / math.log(2)) * batch["weights"]
    assert 0 < weight_sum == batch["weights"].sum() < batch["weights"].size
    np.testing.assert_allclose(metrics["bits_per_byte"][0], bits.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_byte"][0] * math.log(2), loss_sum, rtol=1e-6)
    assert metrics["bits_per_byte"][1] == weight_sum
    assert task.selection_metric == "bits_per_byte"
    assert not task.higher_is_better


@pytest.mark.parametrize(("tokens", "least", "most"), [("8-40", 8, 40), ("40-128", 40, 128)])
def test_the_labels_of_short_listops_are_the_values_of_its_inputs(tokens, least, most):
    task = short_listops.Task(dataclasses.replace(FEW, tokens=tokens), batch_size=5, seed=0)
    assert task.train_batch(0)["inputs"].shape[1] == most
    found = set()
    for batch in [*task.evaluation_batches("test"), *(task.train_batch(step) for step in range(60))]:
        for inputs, length, target in zip(batch["inputs"], batch["lengths"], batch["targets"], strict=True):
            tokens = inputs[:length].tolist()
            assert least <= length <= most
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


def reviews(task: text.Task, split: str) -> list[bytes]:
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


# Masks, and few labels.


def test_masks_are_spans_that_differ_by_step_and_stay_in_an_evaluation():
    config = masked.Config({"name": "digits", "length": 64}, share=0.5, span=8)
    scores = np.random.default_rng(0).random((50, 8))
    mask = masked.draw_mask(scores, np.full(50, 64), 64, config)
    assert (mask.reshape(50, 8, 8).sum(2) == np.where(scores < np.sort(scores)[:, 4:5], 8, 0)).all()
    short = masked.draw_mask(scores[:1], np.array([21]), 64, config)  # of spans of 8, 8 and 5, ten elements
    assert short.sum() == 10
    first, second, _ = np.argsort(scores[0, :3])
    left = 10 - (whole := (8, 8, 5)[first])
    expected = {first: whole, second: left} if left <= (8, 8, 5)[second] else {0: 5, 1: 5}
    assert short[0, :24].reshape(3, 8).sum(1).tolist() == [expected.get(span, 0) for span in range(3)]

    first, other = (masked.Task(config, data_dir=None, batch_size=size, seed=size) for size in (7, 40))
    masks = lambda task, split: np.concatenate([batch["weights"] for batch in task.evaluation_batches(split)])[:200]
    np.testing.assert_array_equal(masks(first, "test"), masks(other, "test"))
    assert (first.train_batch(0)["weights"] != first.train_batch(1)["weights"]).any()
    assert (masks(first, "test")[0] != masks(first, "test")[1]).any()


@pytest.mark.parametrize(("name", "of"), [("masked_symbols", 1.0), ("masked_numbers", 4.0)])
def test_the_loss_of_masked_elements_and_its_baseline(name, of, data_dir):
    """The best constant answer has the loss of the baseline."""
    task = make(name, data_dir, batch_size=200)
    (batch,) = list(task.evaluation_batches("test"))[:1]
    targets, weights = batch["targets"], batch["weights"] > 0
    known = targets[weights]
    if of == 1:
        answer = np.log(np.maximum(np.bincount(known, minlength=task.config.vocabulary_size) / len(known), 1e-30))
    else:
        answer = known.mean(0)
    logits = np.broadcast_to(answer, (*targets.shape[:2], len(answer)))
    loss, weight, metrics = task.loss(SimpleNamespace(logits=jnp.asarray(logits)), jax.tree.map(jnp.asarray, batch))
    found = {metric: float(total / weight) for metric, (total, weight) in metrics.items()}
    assert found == pytest.approx(task.baseline("test"), rel=1e-5)
    assert float(loss / weight) == found["loss"]
    assert task.symbol(3) == task.task.symbol(3) if of == 1 else task.config.channels == 5


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({}, r"config.task.of.name=None: there is no file experiments/tasks/None.py; there are activations, "),
        ({"name": "activations"}, r"config.task.of.name='activations': cannot be masked; name a task of sequences"),
        ({"name": "retrieval"}, r"config.task.of.name='retrieval': its inputs are pairs of documents"),
        ({"name": "corpus", "carry_state": True}, r"config.task.of.carry_state=True: must be False, masked elements"),
        ({"name": "digits", "length": 5}, r"config.task.of.length=5: must divide 64, the number of pixels"),
        (
            {"name": "digits", "length": 8, "patches": True},
            r"config.task.of.length=8: must be 1, 4, 16 or 64, a number",
        ),
    ],
)
def test_what_cannot_be_masked(of, message):
    with pytest.raises(UserError, match=message):
        masked.Task(masked.Config(of), data_dir=None, batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"share": 1.0}, "share=1.0: must be above 0 and below 1"), ({"span": 0}, "span=0: must be at")],
)
def test_mistakes_in_a_mask(fields, message):
    with pytest.raises(ValueError, match=message):
        masked.Config({"name": "digits"}, **fields)


def test_the_data_behind_masks_are_those_of_the_task(data_dir):
    whole = make("text", data_dir)
    task = masked.Task(masked.Config({"name": "text", "length": 50}), data_dir=data_dir, batch_size=4, seed=0)
    assert task.fingerprint == whole.fingerprint != {}
    assert task.of_data == whole.of_data


def test_few_labels_are_as_many_of_every_class_and_of_the_seed():
    few = lambda seed, labels=20: digits.Task(digits.Config(labels=labels), batch_size=20, seed=seed)
    batch, again = few(0).train_batch(0), few(0).train_batch(1)
    assert np.bincount(batch["targets"]).tolist() == [2] * 10
    order = lambda batch: np.unique(batch["inputs"].reshape(20, 64), axis=0)
    np.testing.assert_array_equal(order(batch), order(again))
    assert (order(batch) != order(few(1).train_batch(0))).any()
    assert len(list(few(0).evaluation_batches("test"))) == 10
    for labels, message in (
        (15, "must be a multiple of the 10 classes"),
        (2000, "a class has fewer than 200 examples"),
    ):
        with pytest.raises(UserError, match=f"config.task.labels={labels}: {message}"):
            few(0, labels)


def test_patches_of_digits_are_squares_row_by_row():
    task = digits.Task(digits.Config(length=16, patches=True), batch_size=1, seed=0)
    pixels = np.arange(64, dtype=np.float32)
    rows = task.encode((pixels, 0))
    assert rows[:2].tolist() == [[0, 1, 8, 9], [2, 3, 10, 11]]
    assert rows[15].tolist() == [54, 55, 62, 63]


def test_frames_of_spoken_digits_are_samples_in_a_row(data_dir):
    make_digits = lambda **fields: spoken_digit.Task(
        spoken_digit.Config(**fields), batch_size=1, seed=0, data_dir=data_dir
    )
    samples, frames = (
        next(make_digits(**f).evaluation_batches("test")) for f in ({"length": 40}, {"length": 5, "frame": 8})
    )
    count = int(frames["lengths"][0])
    assert count == samples["lengths"][0] // 8
    np.testing.assert_array_equal(frames["inputs"][0, :count].reshape(-1), samples["inputs"][0, : 8 * count, 0])


# Pictures.


def test_gray_is_that_of_the_published_files():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 200, 90]]], np.uint8)
    # 255.5 times .9999, .2989, .587, .114, and (2.989 + 117.4 + 10.26) / 255, cut.
    assert image.gray(colours).tolist() == [[0, 255, 76, 149, 29, 130]]
    many = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    exact = (many.astype(np.float64) / 255) @ [0.2989, 0.587, 0.114] * 255.5
    assert image.gray(many).shape == (32, 32)
    clear = np.abs(exact - np.round(exact)) > 1e-3  # elsewhere it depends on rounding
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(image.gray(many)[clear], np.floor(exact)[clear])


def test_image_trains_on_the_first_nine_tenths(data_dir):
    task = make("image", data_dir, batch_size=1)
    pictures = open_split("cifar10", "train", data_dir)
    expected = [(image.gray(pictures[i]["image"]).ravel() / 255 - 0.48) / 0.24 for i in range(20)]
    found = [batch["inputs"][0, :, 0] for batch in task.evaluation_batches("validation")]
    np.testing.assert_allclose(found, expected[18:], rtol=0, atol=1e-6)
    epoch = [task.train_batch(step)["inputs"][0, :, 0] for step in range(18)]
    order = lambda rows: sorted(np.round(row, 4).tolist() for row in rows)
    np.testing.assert_allclose(order(epoch), order(expected[:18]), atol=2e-4)
    assert [len(list(task.evaluation_batches(split))) for split in task.splits] == [2, 5]
    bright = image.Task(image.Config(mean=0.0, std=1.0), batch_size=1, seed=0, data_dir=data_dir)
    (first, *_) = bright.evaluation_batches("validation")
    np.testing.assert_allclose(first["inputs"][0, :, 0] * 255, image.gray(pictures[18]["image"]).ravel(), rtol=1e-5)


def test_pathfinder_reads_pixels_row_by_row(data_dir):
    (first, *_) = make("pathfinder", data_dir).evaluation_batches("test")
    picture = open_split("pathfinder/32_hard", "test", data_dir)[0]["image"]
    np.testing.assert_allclose(first["inputs"][0, 4:8, 0], (picture[1] / 255 - 0.5) / 0.5, atol=1e-6)
    config = pathfinder.Config(resolution=32)
    with pytest.raises(UserError, match=r"resolution=32: pictures of pathfinder/32_hard are 4 x 4"):
        pathfinder.Task(config, batch_size=4, seed=0, data_dir=data_dir)


# Pairs of documents.


def test_retrieval_has_both_documents_side_by_side(data_dir):
    batch, *_ = make("retrieval", data_dir).evaluation_batches("test")
    pair = open_split("aan", "test", data_dir)[2]
    whole = [pair["text1"], pair["text2"][:20]]
    assert len(pair["text2"]) > 20
    assert batch["lengths"][2].tolist() == [len(document) for document in whole]
    for column, document in enumerate(whole):
        ids = batch["inputs"][2, :, column]
        assert ids.tolist() == [byte + 1 for byte in document] + [0] * (20 - len(document))
    assert batch["targets"][2] == pair["label"]


# Recordings.


def spoken(data_dir: str, dataset: str, split: str) -> list[dict[str, Any]]:
    source = open_split(dataset, split, data_dir)
    return [source[index] for index in range(len(source))]


def check_recordings(task: Task, split: str, expected: list[dict], train: list[dict]) -> None:
    """The batches of a split hold these recordings, brought to mean 0 and deviation 1 of all of train."""
    samples = np.concatenate([recording["audio"] for recording in train]).astype(np.float64)
    batches = list(task.evaluation_batches(split))
    rows = [np.concatenate([batch[key] for batch in batches]) for key in ("inputs", "lengths", "targets")]
    for recording, inputs, length, target in zip(expected, *rows, strict=False):
        wanted = (recording["audio"][: task.config.length] - samples.mean()) / samples.std()
        assert length == len(wanted)
        np.testing.assert_allclose(inputs[:length, 0], wanted, rtol=1e-5, atol=1e-6)
        assert np.all(inputs[length:] == 0)
        assert target == recording["label"]


@pytest.mark.parametrize("words", [10, 35])
def test_speech_has_mean_0_and_deviation_1_in_training(data_dir, words):
    dataset, task = f"speech_commands/sc{words}", make(f"sc{words}", data_dir)
    train, test = (spoken(data_dir, dataset, split) for split in ("train", "test"))
    assert {len(clip["audio"]) < 30 for clip in test} == {True, False}, "shorter clips and longer ones"
    assert task.config.classes == words
    check_recordings(task, "test", test, train)
    # All of an epoch, uncut: 30 clips, with the trained-on statistics exactly.
    whole = speech_commands.Config(words=words, length=40)
    batch = speech_commands.Task(whole, batch_size=30, seed=0, data_dir=data_dir).train_batch(0)
    inside = np.arange(40) < batch["lengths"][:, None]
    values = batch["inputs"][..., 0][inside].astype(np.float64)
    assert values.size == sum(len(clip["audio"]) for clip in train)
    assert abs(values.mean()) < 1e-6
    assert abs(values.std() - 1) < 1e-6


def test_spoken_digits_are_split_by_the_number_of_the_recording(data_dir):
    task = make("spoken_digit", data_dir)
    number = lambda recording: int(recording["audio/filename"].decode().removesuffix(".wav").rsplit("_")[-1])
    recordings = spoken(data_dir, "spoken_digit", "train")
    train = [recording for recording in recordings if number(recording) >= 10]
    assert len(train) == 6
    for split, numbers in {"test": range(5), "validation": range(5, 10)}.items():
        check_recordings(task, split, [recording for recording in recordings if number(recording) in numbers], train)


@pytest.mark.parametrize("filename", ["3_ann.wav", "ann_3_0.wav", "3_ann_0.flac", "33_ann_0.wav"])
def test_a_recording_of_another_name_is_an_error(tmp_path, filename):
    digits = [{"label": 3, "audio/filename": name} for name in ("3_ann_11.wav", filename, "3_ann_6.wav", "3_ann_0.wav")]
    store_recordings(tmp_path, "spoken_digit", {"train": digits}, 10)
    with pytest.raises(UserError, match=f"'{filename}' is not of the form digit_speaker_number.wav"):
        make("spoken_digit", str(tmp_path))


def test_recordings_of_silence_are_refused(tmp_path):
    names = ("3_ann_11.wav", "3_ann_6.wav", "3_ann_0.wav")
    silence = np.full(9, 5, np.int16)
    digits = [{"label": 3, "audio/filename": name, "audio": silence} for name in names]
    store_recordings(tmp_path, "spoken_digit", {"train": digits}, 10)
    with pytest.raises(UserError, match=r"all numbers of 'audio' in the training data are 5\.0: .* nothing to learn"):
        make("spoken_digit", str(tmp_path))


# Corpora.


def random_bytes(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(256, size=size, dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 5, 6, 23, 24, 25])
@pytest.mark.parametrize(("length", "context"), [(1, 0), (6, 0), (6, 5), (8, 2), (30, 12)])
def test_every_byte_is_scored_once_after_its_context(size, length, context):
    data = random_bytes(size)
    stream = [0, *(data.astype(int) + 1)]  # the byte before each byte, as ids, and the last
    windows = corpus.Windows(data, length, context)
    position = 0
    for index in range(len(windows)):
        ids, scored = windows[index]
        start = position - min(position, context)
        assert scored == position - start
        assert ids.tolist() == stream[start : start + len(ids)]
        assert scored + 1 < len(ids) <= length + 1
        position = start + len(ids) - 1
    assert position == size


def scored_bytes(task: corpus.Task, split: str) -> bytes:
    """What has a weight in a split, in order; and every input is the byte before its target."""
    found: list[int] = []
    for batch in task.evaluation_batches(split):
        for inputs, targets, weights, length in zip(
            batch["inputs"], batch["targets"], batch["weights"], batch["lengths"], strict=True
        ):
            assert inputs[1:length].tolist() == targets[: max(length - 1, 0)].tolist()
            assert not weights[length:].any()
            if length:
                start = len(found) - int((weights[:length] == 0).sum())
                assert inputs[0] == [0, *found][start]
            found += targets[weights > 0].tolist()
    return bytes(symbol - 1 for symbol in found)


def contents(data_dir: str, split: str) -> bytes:
    source = open_split("enwik8", split, data_dir)
    return b"".join(source[index]["bytes"].tobytes() for index in range(len(source)))


def test_a_corpus_is_scored_whole(data_dir):
    task = make("corpus", data_dir)
    for split in task.splits:
        assert scored_bytes(task, split) == contents(data_dir, split)
    length = task.config.length
    first, *_ = task.evaluation_batches("validation")
    assert first["lengths"].tolist() == [16, 16, 16, 2], "validation: blocks without context"
    assert first["inputs"][0, 0] == 0
    first, *_ = task.evaluation_batches("test")
    assert first["lengths"].tolist() == [6, 12, 16, 16], "testing: 6 new bytes after up to 10"
    data = np.frombuffer(contents(data_dir, "train"), np.uint8).astype(int) + 1
    blocks = {tuple(data[start : start + length]) for start in range(0, len(data), length)}
    epoch = [task.train_batch(step) for step in range(3)]  # 12 batch rows: 10 blocks and 2 again
    rows = [tuple(row[:n]) for batch in epoch for row, n in zip(batch["targets"], batch["lengths"], strict=True)]
    assert len(blocks) == 10
    assert set(rows) == blocks


def check_streams(batches: list[Any]) -> list[tuple[list[int], list[int]]]:
    """What each row of the batches reads after the 0 that begins it, and what of it has a weight. Nothing is left out
    between two batches."""
    found = []
    for row in range(len(batches[0]["lengths"])):
        real = [slice(0, batch["lengths"][row]) for batch in batches]
        inputs, targets, weights = (
            np.concatenate([batch[name][row, n] for batch, n in zip(batches, real, strict=True)]).tolist()
            for name in ("inputs", "targets", "weights")
        )
        assert inputs == [0, *targets][:-1]
        assert sum(batch["weights"][row].sum() for batch in batches) == sum(weights), "none behind the length"
        found.append((targets, [symbol for symbol, weight in zip(targets, weights, strict=True) if weight]))
    return found


@pytest.mark.parametrize(("size", "length", "count"), [(540, 20, 4), (80, 20, 4), (81, 20, 4), (79, 20, 4), (7, 3, 7)])
def test_carried_streams_read_every_byte_once_per_epoch_and_continue_where_they_ended(tmp_path, size, length, count):
    data = random_bytes(size + 2 * count)
    (tmp_path / "text").write_bytes(data.tobytes())
    shares = (size / len(data), count / len(data), count / len(data))
    config = corpus.Config(
        files=(str(tmp_path / "text"),), fractions=shares, length=length, context=0, carry_state=True
    )
    make = lambda **batching: corpus.Task(config, batch_size=count, data_dir=None, **{"seed": 0, **batching})
    steps = -(-math.ceil(size / count) // length)
    task = make()
    epoch = [task.train_batch(step) for step in range(steps)]
    assert [batch["begins"].tolist() for batch in epoch] == [[True] * count] + [[False] * count] * (steps - 1)
    parts = check_streams(epoch)
    assert [symbol for part, _ in parts for symbol in part] == (data[:size].astype(int) + 1).tolist()
    assert all(part == scored for part, scored in parts)
    assert {len(part) for part, _ in parts} <= {size // count, size // count + 1}
    for step in (0, steps - 1):  # every epoch is like the first, whatever the seed
        jax.tree.map(np.testing.assert_array_equal, make(seed=1).train_batch(step + 3 * steps), epoch[step])
    if count % 2 == 0:  # a process reads its rows
        halves = [make(process_index=index, process_count=2).train_batch(steps - 1) for index in (0, 1)]
        jax.tree.map(lambda *a: np.testing.assert_array_equal(np.concatenate(a[1:]), a[0]), epoch[-1], *halves)


@pytest.mark.parametrize("count", [1, 2, 5, 84])
def test_one_pass_scores_every_byte_once_after_the_context_of_its_stream(data_dir, count):
    task = make("corpus", data_dir)
    data = (np.frombuffer(contents(data_dir, "test"), np.uint8).astype(int) + 1).tolist()
    streams = check_streams(list(task.streams("test", count)))
    assert [symbol for _, scored in streams for symbol in scored] == data
    for row, (read, scored) in enumerate(streams):
        first = len(data) * row // count
        assert len(scored) == len(data) * (row + 1) // count - first
        assert len(read) - len(scored) == min(first, task.config.context)
        assert data[first + len(scored) - len(read) :][: len(read)] == read


def test_only_the_first_evaluation_bytes_are_used(data_dir):
    config = dataclasses.replace(TASKS["corpus"][1], evaluation_bytes=21)
    task = corpus.Task(config, batch_size=4, seed=0, data_dir=data_dir)
    for split in task.splits:
        assert scored_bytes(task, split) == contents(data_dir, split)[:21]
    np.testing.assert_array_equal(task.train_batch(3)["inputs"], make("corpus", data_dir).train_batch(3)["inputs"])


def test_files_are_read_one_after_the_other(tmp_path):
    data = random_bytes(1000).tobytes()
    (tmp_path / "a.txt").write_bytes(data[:300])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data[300:600]))
    (tmp_path / "c.xz").write_bytes(lzma.compress(data[600:]))
    files = tuple(str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.xz"))
    task = corpus.Task(corpus.Config(files=files, length=64, context=20), batch_size=3, seed=0, data_dir=None)
    assert scored_bytes(task, "validation") == data[900:950]
    assert scored_bytes(task, "test") == data[950:]
    assert task.bytes["train"].tobytes() == data[:900]
    halves = corpus.Config(files=files, fractions=(0.5, 0.25, 0.25), length=64, context=20)
    assert scored_bytes(corpus.Task(halves, batch_size=3, seed=0, data_dir=None), "test") == data[750:]


@pytest.mark.parametrize("suffix", ["gz", "xz"])
@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_a_file_that_is_cut_short_is_named(tmp_path, suffix, keep):
    packed = {"gz": gzip.compress, "xz": lzma.compress}[suffix](random_bytes(5000).tobytes())
    path = tmp_path / f"corpus.{suffix}"
    path.write_bytes(packed[: int(keep * len(packed))])
    with pytest.raises(UserError, match=f"files: {path} is cut short or damaged; download it again"):
        corpus.Task(corpus.Config(files=(str(path),)), batch_size=1, seed=0, data_dir=None)


def test_mistakes_with_files_are_named(tmp_path):
    def refused(**config) -> str:
        with pytest.raises(UserError) as caught:
            corpus.Task(corpus.Config(**config), batch_size=1, seed=0, data_dir=str(tmp_path))
        return str(caught.value)

    assert f"there is no regular file {tmp_path}/none.txt" in refused(files=(f"{tmp_path}/none.txt",))
    assert "there is no regular file" in refused(files=(str(tmp_path),))
    for config in ({}, {"dataset": "enwik8", "files": ("a.txt",)}):
        assert "name text files, as in --config.task.files='(\"a.txt\",)', or a prepared corpus by dataset" in refused(
            **config
        )
    (tmp_path / "short.txt").write_bytes(b"abcd")
    assert "fractions=(0.9, 0.05, 0.05): the validation split has no" in refused(files=(f"{tmp_path}/short.txt",))


def test_the_trivial_answer_to_a_corpus_is_the_frequency_of_bytes(data_dir):
    task = make("corpus", data_dir)
    seen = collections.Counter(contents(data_dir, "train"))
    for split in task.splits:
        data = contents(data_dir, split)
        probabilities = [(seen[byte] + 1) / (seen.total() + 256) for byte in data]
        assert task.baseline(split) == {"bits_per_byte": pytest.approx(-sum(map(math.log2, probabilities)) / len(data))}


def test_repeats_are_found_at_their_distance():
    data = random_bytes(300)
    data[100:120], data[250:262] = data[40:60], data[105:117]
    expected = np.zeros(300, int)
    expected[107:120], expected[257:262] = 60, 145
    np.testing.assert_array_equal(corpus.repeat_distances(data.astype(np.int32) + 1), expected)
    assert corpus.repeat_distances(np.arange(1, 8)).tolist() == [0] * 7


def test_evaluation_reports_the_metric_of_every_slice(data_dir):
    """A string of 8 bytes again after 9, and again after 11."""
    config = corpus.Config(dataset="enwik8", length=28, context=0, repeat_distance=9)
    task = corpus.Task(config, batch_size=1, seed=0, data_dir=data_dir)
    string = list(range(60, 68))
    row = task.row((np.array([0, *string, 5, *string, 6, 7, 8, *string]), 0))
    assert row["slices"].tolist() == [2] * 16 + [0] + [2] * 10 + [1]
    logits = np.random.default_rng(0).normal(size=(1, 28, 257)).astype(np.float32)
    batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
    found = task.evaluation_metrics(SimpleNamespace(logits=jnp.asarray(logits)), batch)
    chosen = np.take_along_axis(logits[0], row["targets"][:, None], -1)[:, 0]
    bits = (np.log(np.exp(logits[0].astype(np.float64)).sum(-1)) - chosen) / math.log(2)
    for name, number, share in (("near_repeats", 0, 1 / 28), ("far_repeats", 1, 1 / 28), ("the_rest", 2, 26 / 28)):
        total, weight = found[f"bits_per_byte_{name}"]
        np.testing.assert_allclose(total / weight, bits[row["slices"] == number].mean(), rtol=1e-5)
        np.testing.assert_allclose(np.divide(*found[f"share_{name}"]), share, rtol=1e-6)


# Generated sequences with slots.


def read_selective_copy(inputs: list[int], config: selective_copy.Config) -> dict[int, int]:
    """The answers at each place, by another way than they were made."""
    assert inputs[config.length :] == [2] * config.symbols
    return dict(enumerate((symbol for symbol in inputs[: config.length] if symbol >= 3), config.length))


def read_mqar(inputs: list[int], config: mqar.Config) -> dict[int, int]:
    """The pairs come first, as many as there are; whatever follows them at even places may be a question."""
    half, begin = config.half, 0
    pairs: dict[int, int] = {}
    while (
        2 <= inputs[begin] < 2 + half <= inputs[begin + 1] and inputs[begin] not in pairs and len(pairs) < config.pairs
    ):
        pairs[inputs[begin]] = inputs[begin + 1]
        begin += 2
    return {place: pairs[key] for place, key in enumerate(inputs) if place >= begin and key in pairs}


def read_parity(inputs: list[int], config: parity.Config) -> dict[int, int]:
    return {place: 1 + (inputs[: place + 1].count(2) & 1) for place in range(len(inputs))}


def read_induction(inputs: list[int], config: induction.Config) -> dict[int, int]:
    first, last = (place for place, symbol in enumerate(inputs) if symbol == 1)
    assert last == config.length - 1
    assert 2 <= inputs[first + 1] < 2 + config.alphabet
    return {last: inputs[first + 1]}


def read_counts(inputs: list[int], config: symbol_function.Config) -> dict[int, int]:
    """`dedupe then count` of the symbol 2, which is 4 as an id: runs of it so far."""
    given = inputs[:12]
    assert inputs[12:] == [1] * 12
    runs = [one for one, before in zip(given, [None, *given[:-1]], strict=True) if one != before]
    return {12 + place: 2 + runs[: place + 1].count(4) for place in range(12)}


@pytest.mark.parametrize(
    ("name", "read", "chance"),
    [
        ("selective_copy", read_selective_copy, 4),
        ("mqar", read_mqar, 5),
        ("mqar_random_fillers", read_mqar, 5),
        ("induction", read_induction, 4),
        ("parity", read_parity, 2),
        ("symbol_function", read_counts, None),
    ],
)
def test_the_answers_are_in_the_inputs(data_dir, name, read, chance):
    task = make(name, data_dir)
    examples: dict[str, set] = collections.defaultdict(set)
    train = [task.train_batch(step) for step in range(13)]
    for split, batches in [("train", train), *((split, task.evaluation_batches(split)) for split in task.splits)]:
        for batch in batches:
            for inputs, targets, weights in zip(batch["inputs"], batch["targets"], batch["weights"], strict=True):
                if weights.any():
                    answers = read(inputs.tolist(), task.config)
                    asked = {place: targets[place] for place in np.flatnonzero(weights).tolist()}
                    if name == "mqar_random_fillers":  # what stands between may be a key too, and is not asked
                        answers = {place: answers[place] for place in asked}
                        assert len(set(inputs[list(asked)])) == len(asked)
                    assert asked == answers
                    assert not targets[weights == 0].any()
                    examples[split].add(tuple(inputs.tolist()))
        if chance is not None:
            assert task.baseline(split if split != "train" else "test") == {"accuracy": 1 / chance}
    found = list(examples.values())
    assert all(len(each) >= 9 for each in found)
    assert not found[0] & found[1]
    assert not found[1] & found[2]


def test_questions_of_mqar_come_by_a_power_law():
    fields = {"length": 64, "pairs": 3, "test_examples": 400}
    task = mqar.Task(mqar.Config(**fields), batch_size=400, seed=0)
    (test,) = task.evaluation_batches("test")
    assert set(test["weights"].sum(1)) == {3}
    _, places = np.nonzero(test["weights"])
    assert not (places % 2).any()
    # The first of 29 gaps has a quarter of the weight: three draws without replacement take it more often than not.
    assert 0.45 < (test["weights"][:, 6] == 1).mean() < 0.65
    flat = mqar.Task(mqar.Config(**fields, power=1.0), batch_size=400, seed=0)
    (test,) = flat.evaluation_batches("test")
    assert 0.05 < (test["weights"][:, 6] == 1).mean() < 0.16  # 3 / 29


@pytest.mark.parametrize(
    "name", ["selective_copy", "mqar", "induction", "parity", "codes", "tokfsm", "symbol_function"]
)
def test_generated_sequences_depend_on_the_data_seed_alone(data_dir, name):
    module, config, _ = TASKS[name]
    first = lambda **fields: next(
        module.Task(dataclasses.replace(config, **fields), batch_size=10, seed=5).evaluation_batches("test")
    )["inputs"]
    (expected, *_) = make(name, data_dir, batch_size=10).evaluation_batches("test")
    np.testing.assert_array_equal(first(), expected["inputs"])
    assert np.any(first(data_seed=1) != expected["inputs"])


# The random machine.


def walked(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """The states of a walk, by their decimal numbers: the last one is half read and half asked for."""
    return [int("".join(map(str, pair))) for pair in (np.append(inputs[1:], targets[-1]) - 2).reshape(-1, 2).tolist()]


def test_walks_follow_the_machine_and_every_digit_says_what_may_follow(data_dir):
    task = make("tokfsm", data_dir)
    follow = [{int(to) for to in row} for row in task.successors]
    assert all(len(row) == 3 for row in follow)
    assert (
        scipy.sparse.csgraph.connected_components(
            np.array([[j in row for j in range(30)] for row in follow]), connection="strong"
        )[0]
        == 1
    )
    seen = set()
    for batch in (task.train_batch(step) for step in range(20)):
        states = task.truth(batch)["state"]
        for row in range(4):
            walk = walked(batch["inputs"][row], batch["targets"][row])
            assert states[row].tolist() == [-1, -1, *np.repeat(walk[:-1], 2)]
            assert batch["weights"][row].tolist() == [0, 0, *[1] * 10]
            np.testing.assert_array_equal(batch["targets"][row, 2:-1], batch["inputs"][row, 3:])
            for place, (state, to) in enumerate(pairwise(walk)):
                assert to in follow[state]
                seen.add((state, to))
                first, second = (
                    {d for d in range(10) if bits >> d & 1} for bits in batch["legal"][row, 2:].reshape(-1, 2)[place]
                )
                assert first == {other // 10 for other in follow[state]}
                assert second == {other % 10 for other in follow[state] if other // 10 == to // 10}
    assert 60 < len(seen) <= 90


def test_the_metrics_of_the_machine_are_probabilities_of_legal_digits(data_dir):
    task = make("tokfsm", data_dir)
    *_, batch = task.evaluation_batches("test")  # the last one has rows of weight 0
    logits = np.random.default_rng(0).normal(size=(4, 12, 12)).astype(np.float32)
    run = jax.jit(lambda logits, batch: task.loss(SimpleNamespace(logits=logits), batch)[2])
    found = run(logits, batch)
    found = {name: float(total / weight) for name, (total, weight) in found.items()}
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mass = np.array(
        [
            [sum(p[b, t, 2 + d] for d in range(10) if batch["legal"][b, t] >> d & 1) for t in range(2, 12)]
            for b in (0, 1)
        ]
    )
    chosen = np.take_along_axis(p[:2, 2:], batch["targets"][:2, 2:, None], -1)
    assert found == {
        "loss": pytest.approx(-np.log(chosen).mean(), rel=1e-5),
        "transition": pytest.approx((mass[:, ::2] * mass[:, 1::2]).mean(), rel=1e-5),
        "legal": pytest.approx(mass.mean(), rel=1e-5),
    }
    # Equal digits have the baseline's mass.
    flat = np.where(np.arange(12) < 2, -1e9, 0.0)[None, None].repeat(4, 0).repeat(12, 1)
    sums = [run(flat.astype(np.float32), each)["transition"] for each in task.evaluation_batches("test")]
    assert task.baseline("test") == {"transition": pytest.approx(np.divide(*np.sum(sums, 0)), rel=1e-5)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 13}, "length=13: must be even, since every state has two digits"),
        ({"edges": 31}, "edges=31: must be at most 30"),
        ({"states": 101}, "states=101: must be at most 100"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tokfsm.Config(**{"states": 30, "edges": 3, "length": 12, **fields})


# Codes of a known entropy.

FEW_CODES = codes.Config(train_examples=1500, test_examples=10, length=4, coarse=3, fine=3, edges=2, choices=2)


@pytest.mark.parametrize("neighbour", ["next", "previous"])
def test_every_sequence_of_codes_has_the_same_probability(neighbour):
    task = codes.Task(dataclasses.replace(FEW_CODES, neighbour=neighbour), batch_size=1500, seed=0)
    found = collections.Counter(map(tuple, task.train_batch(0)["inputs"][:, 1:].tolist()))
    assert len(found) == 3 * 2**2 * 2**3
    assert 3 * task.config.entropy == pytest.approx(math.log2(len(found)))
    expected = 1500 / len(found)
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 95 + 4 * math.sqrt(2 * 95)
    # The clusters walk, and what may be in a cluster depends on the neighbour.
    walks = {tuple((code - 2) // 3 for code in sequence) for sequence in found}
    assert {(a, b) for a, b, _ in walks} == {(a, int(b)) for a in range(3) for b in task.successors[a]}
    place = 0 if neighbour == "next" else 1
    choices = {((s[0] - 2) // 3, (s[1] - 2) // 3, s[place]) for s in found}
    assert set(collections.Counter(choice[:2] for choice in choices).values()) == {2}


def test_bits_of_codes_are_those_of_clusters_and_of_codes_in_them():
    task = codes.Task(dataclasses.replace(FEW_CODES, shuffled=True), batch_size=4, seed=0)
    *_, batch = task.evaluation_batches("test")  # the last one has rows of weight 0
    logits = np.random.default_rng(0).normal(size=(4, 4, 11)).astype(np.float32)
    compute = lambda output, batch: task.loss(output, batch)[2] | task.evaluation_metrics(output, batch)
    found = jax.jit(lambda logits, batch: compute(SimpleNamespace(logits=logits), batch))(logits, batch)
    found = {name: float(total / weight) for name, (total, weight) in found.items()}
    p, groups = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), np.array(task.config.clusters)
    whole, coarse = [], []
    for row, place in np.argwhere(batch["weights"] > 0):
        target = batch["targets"][row, place]
        whole.append(-np.log2(p[row, place, target]))
        coarse.append(-np.log2(p[row, place, groups == groups[target]].sum()))
    assert found == {
        "loss": pytest.approx(np.mean(whole) * math.log(2), rel=1e-5),
        "bits_per_token": pytest.approx(np.mean(whole), rel=1e-5),
        "bits_coarse": pytest.approx(np.mean(coarse), rel=1e-5),
        "bits_fine": pytest.approx(np.mean(whole) - np.mean(coarse), rel=1e-5),
        "excess": pytest.approx(np.mean(whole) - task.config.entropy, rel=1e-5),
    }
    assert sorted(groups) == sorted(FEW_CODES.clusters)
    assert tuple(groups) != FEW_CODES.clusters
    targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in task.evaluation_batches("test")])
    share = np.bincount(targets)[2:] / len(targets)
    assert task.baseline("test") == {"bits_per_token": pytest.approx(-np.sum(share * np.log2(np.maximum(share, 1e-9))))}
    assert [task.symbol(number) for number in (0, 1, 2, 10)] == ["∅ ", "→ ", "0.0 ", "2.2 "]


def test_digits_as_codes_are_the_nearest_of_the_codebook():
    """Every square of 2 x 2 pixels; a code's cluster has the codes near it, and shuffled ones are as large."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    task = digit_codes.Task(digit_codes.Config(codes=8, coarse=3), batch_size=4, seed=0)
    centers, groups = digit_codes.codebook(8, 3)
    picture = digits.read()[0][200].reshape(8, 8)  # the first of the test split
    squares = np.array([picture[i : i + 2, j : j + 2].ravel() for i in range(0, 8, 2) for j in range(0, 8, 2)])
    expected = 2 + np.square(squares[:, None] - centers).sum(-1).argmin(1)
    batch = next(task.evaluation_batches("test"))
    assert batch["inputs"][0].tolist() == [1, *expected]
    assert batch["targets"][0].tolist() == [*expected, 0]
    assert task.config.clusters == (0, 0, *(groups + 1))
    other = digit_codes.Task(dataclasses.replace(task.config, shuffled=True), batch_size=4, seed=0)
    assert task.fingerprint != other.fingerprint
    means = np.array([centers[groups == group].mean(0) for group in range(3)])
    np.testing.assert_array_equal(np.square(centers[:, None] - means).sum(-1).argmin(1), groups)
    shuffled = dataclasses.replace(task.config, shuffled=True).clusters
    assert sorted(shuffled) == sorted(task.config.clusters)
    assert shuffled != task.config.clusters
    with pytest.raises(ValueError, match="coarse=9: must be at most 8"):
        digit_codes.Config(codes=8, coarse=9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edges": 4}, "edges=4: must be at most 3"),
        ({"choices": 4}, "choices=4: must be at most 3"),
        ({"length": 1}, "length=1: must be at least 2"),
        ({"fine": 30_000}, "fine=30000: must be at most 21845"),
        ({"neighbour": "both"}, "neighbour='both': must be one of next, previous"),
    ],
)
def test_codes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FEW_CODES, **fields)


# Mistakes in a config.


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
        (image, "std", 0.0),
        (speech_commands, "words", 12),
        (selective_copy, "symbols", 0),
        (selective_copy, "length", 7),
        (mqar, "vocabulary", 7),
        (mqar, "length", 15),
        (mqar, "power", 0.0),
        (mqar, "data_seed", -1),
        (parity, "test_length", 39),
        *((module, "length", 2**31) for module in (text, listops, retrieval, speech_commands, corpus)),
        *((selective_copy, field, 2**31) for field in ("length", "symbols", "alphabet", "train_examples")),
        *((mqar, field, value) for field in ("pairs", "vocabulary", "length") for value in (0, -1, 2**31)),
        *((module, "mean", value) for module in (image, pathfinder) for value in (math.nan, math.inf)),
        *((module, "std", value) for module in (image, pathfinder) for value in (math.nan, math.inf, -1.0)),
        (text, "validation_fraction", math.nan),
        (corpus, "length", 0),
        (corpus, "context", 8192),
        (corpus, "evaluation_bytes", 0),
        (corpus, "repeat_distance", 0),
        (corpus, "fractions", (0.5, 0.5, 0.5)),
    ],
)
def test_mistakes_in_a_config_are_named(module, field, value):
    with pytest.raises(UserError, match=re.escape(f"config.task.{field}={value}: must ")):
        to_dataclass(module.Config, {field: value}, "config.task")


def test_tasks_say_which_data_are_missing(tmp_path):
    names = {
        listops.Config(): "listops",
        text.Config(): "imdb_reviews/plain_text",
        image.Config(): "cifar10",
        pathfinder.Config(dataset="pathfinder/128_hard"): "pathfinder/128_hard",
        retrieval.Config(): "aan",
        speech_commands.Config(words=35): "speech_commands/sc35",
        spoken_digit.Config(): "spoken_digit",
        corpus.Config(dataset="text8"): "text8",
    }
    modules = {module.Config: module for module, _, _ in TASKS.values()}
    for config, name in names.items():
        with pytest.raises(UserError, match=f"data set '{name}' is not in {tmp_path}"):
            modules[type(config)].Task(config, batch_size=1, seed=0, data_dir=str(tmp_path))


# Data that a task cannot be made of.


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        (
            text,
            text.Config(validation_fraction=0.001),
            "config.task.validation_fraction=0.001: the validation split of imdb_reviews/plain_text has no examples",
        ),
        (
            text,
            text.Config(validation_fraction=0.999),
            "config.task.validation_fraction=0.999: the train split of imdb_reviews/plain_text has no examples",
        ),
        (corpus, (0.999, 0.0005, 0.0005), "fractions=(0.999, 0.0005, 0.0005): the validation split has no examples"),
        (corpus, (0.001, 0.5, 0.499), "fractions=(0.001, 0.5, 0.499): the train split has no examples"),
        (corpus, (0.5, 0.499, 0.001), "fractions=(0.5, 0.499, 0.001): the test split has no examples"),
    ],
)
def test_a_split_without_examples_is_named_with_the_field_that_decides_it(data_dir, tmp_path, module, config, message):
    if module is corpus:
        (tmp_path / "text").write_bytes(b"some letters")
        config = corpus.Config(files=(str(tmp_path / "text"),), fractions=config)
    with pytest.raises(UserError, match=re.escape(message)):
        module.Task(config, batch_size=4, seed=0, data_dir=data_dir)


def test_too_few_recordings_or_pictures_for_a_split_are_named(tmp_path):
    digits = [{"label": 3, "audio/filename": f"3_ann_{number}.wav"} for number in (11, 12, 0)]
    store_recordings(tmp_path, "spoken_digit", {"train": digits}, 10)
    with pytest.raises(UserError, match="the validation split of spoken_digit has no examples"):
        make("spoken_digit", str(tmp_path))
    store_pictures(tmp_path, "cifar10", (32, 32, 3), 10, {"train": 2, "test": 1})
    with pytest.raises(UserError, match="the validation split of cifar10 has no examples"):
        make("image", str(tmp_path))


def test_short_splits_and_large_batches_are_not_errors(tmp_path):
    """A text shorter than a sequence is one sequence; a batch larger than the split repeats it."""
    (tmp_path / "text").write_bytes(b"twenty letters, more")
    config = corpus.Config(files=(str(tmp_path / "text"),), length=64, context=0)
    task = corpus.Task(config, batch_size=8, seed=0, data_dir=None)
    assert task.train_batch(0)["lengths"].tolist() == [18] * 8
    assert scored_bytes(task, "test") == b"e"


def test_examples_of_another_vocabulary_are_refused(tmp_path):
    features = {
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        "label": tfds.features.Tensor(shape=(), dtype=np.int64),
    }
    for name, tokens, label, message in (
        ("a", [1, 17], 1, r"of listops/a has ids in 1\.\.17; this task has the ids 1\.\.16"),
        ("b", [3, -1], 1, r"of listops/b has ids in -1\.\.3"),
        ("c", [3, 4], 10, r"of listops/c has the label 10; this task has the classes 0\.\.9"),
        ("d", [3, 4], -1, r"of listops/d has the label -1"),
    ):
        example = {"tokens": np.array(tokens), "label": label}
        store(tmp_path, f"listops/{name}", features, {split: [example] for split in ("train", "validation", "test")})
        with pytest.raises(UserError, match=message):
            listops.Task(listops.Config(dataset=f"listops/{name}"), batch_size=1, seed=0, data_dir=str(tmp_path))
    assert expressions.VOCABULARY_SIZE == 17


def test_a_prepared_set_of_another_kind_is_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match="data set 'listops' has no 'bytes' but label, tokens"):
        corpus.Task(corpus.Config(dataset="listops"), batch_size=1, seed=0, data_dir=data_dir)
    with pytest.raises(UserError, match="data set 'aan' has no 'image' but"):
        pathfinder.Task(pathfinder.Config(dataset="aan"), batch_size=1, seed=0, data_dir=data_dir)
    numbers = {"bytes": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
    example = {"bytes": np.arange(300, dtype=np.int32)}
    store(tmp_path, "numbers", numbers, {split: [example] for split in ("train", "validation", "test")})
    with pytest.raises(UserError, match="dataset='numbers': its train split holds int32, expected bytes"):
        corpus.Task(corpus.Config(dataset="numbers"), batch_size=1, seed=0, data_dir=str(tmp_path))


def test_what_identifies_the_data_of_a_task(name, task):
    found = task.fingerprint
    assert all(re.fullmatch(r"[\d,]+ (examples|bytes), sha256 [0-9a-f]{64}", value) for value in found.values())
    generated = (
        "short_listops",
        "gliding_digits",
        "selective_copy",
        "mqar",
        "mqar_random_fillers",
        "induction",
        "parity",
        "codes",
        "tokfsm",
        "symbol_function",
    )
    parts = {"text": 2, "image": 2, "spoken_digit": 1}.get(name, 3)
    assert len(found) == (0 if name in generated or name.startswith(("masked", "gliding")) else parts)


@pytest.mark.parametrize("place", ["~nosuchuser/a", "gs://bucket/a", "a\0b", "a" * 5000])
def test_files_that_cannot_be_are_named(place):
    with pytest.raises(UserError, match=r"^config\.task\.files="):
        corpus.Task(corpus.Config(files=(place,)), batch_size=1, seed=0, data_dir=None)


def test_a_packed_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "enwik8").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(UserError, match=rf"^config\.task\.files: {tmp_path}/enwik8 is a zstd file, not text"):
        corpus.Task(corpus.Config(files=(str(tmp_path / "enwik8"),)), batch_size=1, seed=0, data_dir=None)


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
    assert task.baseline("validation") == {"accuracy": 0.5}
    assert task.train_batch(0)["inputs"].shape == (50, 4000)
