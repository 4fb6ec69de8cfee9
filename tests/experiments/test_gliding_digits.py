"""Gliding digits: where a digit is in every frame, why its order is needed, and metrics of answers per frame."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from configs.synthetic.gliding_digits import get_config
from experiments.common.errors import UserError
from experiments.evaluation import evaluator
from experiments.evaluation.examples import Scores
from experiments.reports import pictures
from experiments.reports.excerpts import excerpts
from experiments.tasks import digits
from experiments.tasks.gliding_digits import DIRECTIONS, Config, Task, _drawing, glide
from experiments.training.experiment import build

CONFIG = Config(length=4, size=12, train_examples=200, test_examples=60)
IMAGE = np.arange(1, 65, dtype=np.float32).reshape(8, 8)


def corner(frame):
    """Row and column of the digit's first pixel."""
    return tuple(int(index) for index in np.argwhere(frame == 1)[0])


def test_where_a_digit_is_in_every_frame():
    found = {
        name: [corner(frame) for frame in glide(IMAGE, number, 1, 3, 3, 12)] for number, name in enumerate(DIRECTIONS)
    }
    assert found == {
        "right": [(3, 1), (3, 2), (3, 3)],
        "left": [(3, 3), (3, 2), (3, 1)],
        "down": [(1, 3), (2, 3), (3, 3)],
        "up": [(3, 3), (2, 3), (1, 3)],
    }
    frame = glide(IMAGE, 0, 1, 3, 3, 12)[2]
    np.testing.assert_array_equal(frame[3:11, 3:11], IMAGE)
    assert frame.sum() == IMAGE.sum()


def test_the_set_of_the_frames_does_not_tell_a_direction_from_its_opposite():
    for start in (0, 1):
        for way, opposite in ((0, 1), (2, 3)):
            there, back = (glide(IMAGE, direction, start, 2, 4, 12) for direction in (way, opposite))
            np.testing.assert_array_equal(there[::-1], back)


def test_with_wrap_only_the_motion_tells():
    """The first frames of a line's two directions are at the same places; without it they are not."""
    first = lambda direction, starts: sorted(corner(glide(IMAGE, direction, s, 2, 4, 12)[0]) for s in range(starts))
    for way, opposite in ((0, 1), (2, 3)):
        assert first(way, 12) == first(opposite, 12)
        assert not set(first(way, 2)) & set(first(opposite, 2))
    config = dataclasses.replace(CONFIG, wrap=True, length=12)
    draw = _drawing(IMAGE[None], config)
    places = [corner(draw(np.random.default_rng(seed))[0][0]) for seed in range(40)]
    assert max(row for row, _ in places) > config.size - 8 < max(column for _, column in places)


def test_clips_are_drawn_evenly_from_images_of_their_split():
    task = Task(CONFIG, batch_size=20, seed=0)
    pixels = lambda image: tuple(np.sort(image[image > 0]))  # which are those of one image
    own = {split: set(map(pixels, digits.read()[0][part])) for split, part in digits.SPLITS.items()}
    assert not own["train"] & own["test"]
    for split in task.splits:
        drawn = [pixels(clip[0]) for batch in task.evaluation_batches(split) for clip in batch["inputs"]]
        assert len(set(drawn)) > 30
        assert set(drawn) <= own[split]
    targets = np.concatenate([task.train_batch(step)["targets"] for step in range(10)])
    assert np.bincount(targets, minlength=4).min() > 30


def test_answers_of_clips_are_the_most_likely_of_the_mean():
    task = Task(dataclasses.replace(CONFIG, answer="frame"), batch_size=4, seed=0)
    logits = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32) * 2
    targets, weights = np.array([[1], [2], [0], [3]]).repeat(4, 1), np.ones((4, 4), np.float32)
    weights[3] = 0
    batch = {"targets": targets, "weights": weights}
    both = lambda *given: (task.evaluation_metrics(*given), task.loss(*given))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    answers = chances.mean(1).argmax(1)
    found, loss = jax.jit(lambda logits, batch: both(SimpleNamespace(logits=logits), batch))(logits, batch)
    right, count = found["clip_accuracy"]
    assert (float(right), float(count)) == ((answers == targets[:, 0])[:3].sum(), 3)
    expected = np.zeros((4, 4))
    for target, answer in zip(targets[:3, 0], answers[:3], strict=True):
        expected[target, answer] += 1
    np.testing.assert_array_equal(found["confusion"][0], expected)
    np.testing.assert_allclose(
        loss[0], -np.log(chances[np.arange(4)[:, None], np.arange(4), targets])[:3].sum(), rtol=1e-5
    )
    assert float(loss[1]) == 12


def test_evaluations_and_reports_name_the_directions(monkeypatch, capsys, tmp_path):
    task = Task(CONFIG, batch_size=4, seed=0)
    counts = np.diag([3.0, 2, 0, 0]) + np.eye(4)[::-1]
    scores = Scores({"confusion": (counts, counts.sum(1, keepdims=True))}, {}, (), {})
    values = {"task": {"name": "gliding_digits"}}
    run = SimpleNamespace(task=task, experiment=None, step=0, best=True, values=values, data_changes=[], parameters=16)
    monkeypatch.setattr(evaluator, "load", lambda *_: run)
    monkeypatch.setattr(evaluator, "score", lambda *_: scores)
    result = evaluator.measure_run(tmp_path)
    assert result["per_class"]["name"] == ["right", "left", "down", "up"]
    assert result["parameters"] == 16
    evaluator.show(result)
    rows = [re.sub("[│┃]", " ", line).split() for line in capsys.readouterr().out.splitlines()]
    assert ["right", "0.7500", "0.7500", "4"] in rows
    assert ["class", "right", "left", "down", "up"] in rows
    monkeypatch.setattr(pictures, "waveform", lambda *_: "")
    example = {name: array[0] for name, array in task.train_batch(0).items()}
    measured = SimpleNamespace(
        examples=[{**example, "targets": np.int32(3)}],
        numbers=[0],
        answers=np.array([1]),
        valid=np.ones((1, 4)),
        names=(),
        active=np.zeros((0, 1, 4)),
        confidence=np.zeros((0, 1, 4)),
    )
    (shown,) = excerpts(task, measured)["examples"]
    assert (shown["target"], shown["answer"]) == ("up", "left")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 10}, "length=10: must be at most 9, the places of a digit on size=16 pixels"),
        ({"length": 2, "size": 8}, "length=2: must be at most 1, the places of a digit on size=8 pixels"),
        ({"size": 7}, "size=7: must be at least 8"),
        ({"answer": "pixel"}, "answer='pixel': must be one of clip, frame"),
        ({"test_examples": 0}, "test_examples=0: must be at least 1"),
        ({"data_seed": -1}, "data_seed=-1: must not be negative"),
    ],
)
def test_mistakes_in_gliding_digits(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Config(**fields)


@pytest.mark.parametrize("variant", ["tiny,unordered", "tiny,per_frame,no_attention,lstm"])
def test_a_recipe_builds_what_it_says(variant):
    config = get_config(variant)
    config.task.update(train_examples=40, test_examples=10)
    experiment = build(config.to_dict())
    batch, functions = experiment.task.example(), experiment.functions
    metrics = jax.eval_shape(lambda batch: functions.evaluate(functions.variables(0), batch), batch)
    clips = {"clip_accuracy"} if "per_frame" in variant else set()
    assert set(metrics) == {"loss", "accuracy", "confusion", "elements"} | clips
    assert experiment.model.config.answer == ("frame" if clips else "clip")
    assert experiment.model.config.encoder.layer.mixer.name == ("lstm" if clips else "elman")


def test_a_board_of_another_size_needs_frames_of_that_size():
    config = get_config("tiny")
    config.task.size = 20
    with pytest.raises(UserError) as caught:
        build(config.to_dict())
    message = "config.model.frame=(16, 16, 1): has 256 numbers, and a frame of this task 400"
    assert str(caught.value) == message
