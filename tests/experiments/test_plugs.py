"""Files that a config names are found by their names: a new one needs no edit elsewhere."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqboat.layers.mixers
import seqboat.models.heads
from configs import base, quickstart
from configs.lm import bytes as recipe
from experiments.common.errors import UserError
from experiments.common.plugs import find, names
from experiments.evaluation.evaluator import measure_run
from experiments.evaluation.sampling import Sampling, generate
from experiments.reports.writer import write_report
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE
from experiments.training.models import build_model
from experiments.training.restore import load, load_generator
from tests.helpers import SMALL_MODEL, assert_close, plant
from tests.test_readme import ROOT, python_blocks

SMALL = {name: value for name, value in SMALL_MODEL.items() if "mixer" not in name}


@pytest.mark.breadth  # tests/test_readme.py: it streams; tests/layers/test_mixers.py: any mixer; test_loop.py: a run
def test_a_mixer_of_thirty_lines_trains_streams_is_evaluated_and_reloaded(monkeypatch, tmp_path):
    source = python_blocks((ROOT / "docs/extending.md").read_text())[1]
    plant(monkeypatch, tmp_path, seqboat.layers.mixers, "leaky_average", source)
    (tmp_path / "text").write_bytes(np.random.default_rng(0).integers(97, 105, 400).astype(np.uint8).tobytes())
    config = recipe.get_config("tiny,leaky_average")
    sizes = {"task.length": 16, "task.context": 8, "task.files": (str(tmp_path / "text"),), "task.carry_state": True}
    steps = {"train.steps": 3, "train.batch_size": 2, "train.evaluate_every": 3, "train.checkpoint_every": 3}
    config.update_from_flattened_dict({**SMALL, **sizes, **steps, "model.mixer.state_size": 3})
    train(build(config.to_dict()), tmp_path / "run")
    assert 6 < measure_run(tmp_path / "run")["bits_per_byte"] < 10
    run = load(tmp_path / "run")
    assert run.variables["params"]["encoder"]["layers"]["ssm"]["rate"].shape == (2, 8, 3)
    tokens, state = jnp.arange(24).reshape(2, 12), run.model.initial_state(2)
    whole = jax.jit(run.model.apply)(run.variables, tokens, jnp.full(2, 12)).logits
    stream = jax.jit(
        lambda tokens, state: run.model.apply(run.variables, tokens, jnp.full(2, 4), state, method="stream")
    )
    pieces = []
    for start in (0, 4, 8):
        out, state = stream(tokens[:, start : start + 4], state)
        pieces.append(out.logits)
    assert_close(np.concatenate(pieces, 1), whole)


@pytest.mark.breadth  # test_a_head_says_what_it_needs_of_a_task; tests/models/test_heads.py; test_loop.py: a run
def test_a_head_of_thirty_lines_trains_is_evaluated_and_reloaded(monkeypatch, tmp_path):
    source = python_blocks((ROOT / "docs/extending.md").read_text())[3]
    plant(monkeypatch, tmp_path, seqboat.models.heads, "nearest", source)
    (tmp_path / "text").write_bytes(np.random.default_rng(0).integers(97, 105, 400).astype(np.uint8).tobytes())
    config = recipe.get_config("tiny")
    config.model.head = base.head("nearest", norm_penalty=0.5)
    sizes = {"task.length": 16, "task.context": 8, "task.files": (str(tmp_path / "text"),)}
    steps = {"train.steps": 2, "train.batch_size": 2, "train.evaluate_every": 2, "train.checkpoint_every": 2}
    config.update_from_flattened_dict({**SMALL_MODEL, **sizes, **steps, "model.layers": 1, "model.head.per_class": 3})
    train(build(config.to_dict()), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert [0.5 < row["term/point_norm"] < 1.5 for row in records if row["kind"] == "train"] == [True, True]
    measured = measure_run(tmp_path / "run")["bits_per_byte"]
    run = load(tmp_path / "run")
    points = run.variables["params"]["head"]["points"]
    assert points.shape == (257, 3, 8)
    assert abs(measured - 8) < 1, "uniform, nearly"
    x = jnp.ones((2, 8))
    logits = run.model.config.head.make(8, 257).apply({"params": {"points": points}}, x)
    assert_close(logits, -jnp.square(points - 1).mean(-1).min(-1)[None].repeat(2, 0))


def test_a_head_says_what_it_needs_of_a_task(monkeypatch, tmp_path):
    source = "import dataclasses\nfrom seqboat.choices import given\nfrom seqboat.models.head import HeadConfig\n"
    source += (
        "@dataclasses.dataclass(frozen=True)\nclass Config(HeadConfig):\n    {}: int = given()\n    size: int = 3\n"
    )
    plant(monkeypatch, tmp_path, seqboat.models.heads, "of_symbols", source.format("vocabulary_size"))
    plant(monkeypatch, tmp_path, seqboat.models.heads, "of_rooms", source.format("rooms"))
    config = recipe.get_config("tiny")
    config.task.files = ("-",)
    values = lambda **fields: {**config.to_dict()["model"], "head": {"name": "of_symbols", **fields}}
    sizes = SimpleNamespace(vocabulary_size=7, channels=None)
    assert dataclasses.asdict(build_model(values(size=4), sizes).config.head) == {"vocabulary_size": 7, "size": 4}
    for fields, message in (
        ({"vocabulary_size": 3}, r"config\.model\.head\.vocabulary_size: not set here, the task decides it"),
        ({"name": "of_rooms"}, r"config\.model\.head\.name='of_rooms': this task is not for it, it has no rooms"),
        (
            {"name": "s6"},
            r"config\.model\.head\.name='s6': there is no file seqboat/models/heads/s6\.py; there are .*mlp",
        ),
        ({"width": 3}, r"config\.model\.head\.width: unknown field"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(values(**fields), sizes)


def test_a_head_takes_the_place_of_the_one_of_a_recipe():
    config = quickstart.get_config()
    assert config.model.head == "mlp"
    config.lock()
    config.model.head = base.head("linear")
    assert base.block(config.model, "transformer").head.name == "linear"
    config.model.head = "linear"


@pytest.mark.parametrize("name", ["s6", "../ema", "ema.py", "", "_private", None])
def test_a_file_that_is_missing_is_named(name):
    with pytest.raises(UserError, match=r"config.model.mixer.name=.*: there is no file seqboat/layers/mixers/.*ema, "):
        find("seqboat.layers.mixers", name, "config.model.mixer.name")


def test_files_that_begin_with_an_underscore_are_not_found(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, seqboat.layers.mixers, "_shared", "")
    assert "_shared" not in names("seqboat.layers.mixers")
    assert "ema" in names("seqboat.layers.mixers")


@pytest.mark.breadth  # test_transformer_runs.py: another block; test_mega.py: its layer, in pieces too
def test_the_mega_variant_trains_is_evaluated_and_generates(tmp_path):
    """What it generates are the most probable bytes of the whole sequence."""
    (tmp_path / "text").write_bytes(np.random.default_rng(0).integers(97, 105, 400).astype(np.uint8).tobytes())
    config = recipe.get_config("tiny,mega")
    assert (config.model.block, config.model.features, config.model.position) == ("mega", 96, "rotary")
    own = {name: value for name, value in SMALL_MODEL.items() if name.removeprefix("model.") in config.model}
    sizes = {"task.length": 16, "task.context": 8, "task.files": (str(tmp_path / "text"),)}
    steps = {"train.steps": 2, "train.batch_size": 2, "train.evaluate_every": 2, "train.checkpoint_every": 2}
    config.update_from_flattened_dict(
        {**own, **sizes, **steps, "model.layers": 1, "model.chunk": 8, "model.feed_forward_size": 8}
    )
    experiment = build(config.to_dict())
    assert "width 8, MEGA, softmax attention in chunks of 8, ema by" in experiment.describe()
    train(experiment, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    (evaluated,) = [record for record in records if record["kind"] == "evaluation"]
    assert 6 < evaluated["bits_per_byte"] < 10
    run = load_generator(tmp_path / "run")
    model, variables = run.model, run.variables
    prompt = bytes(range(97, 107))
    drawn = np.stack(list(generate(model, variables, prompt, Sampling(temperature=0), batch=1, count=9)), 1)[0]
    tokens = jnp.asarray(np.concatenate([np.frombuffer(prompt, np.uint8), drawn])[None] + 1, jnp.int32)
    logits = jax.jit(model.apply)(variables, tokens, jnp.full(1, 19)).logits[0]
    np.testing.assert_array_equal(drawn, np.asarray(logits[9:-1, 1:]).argmax(1))
    with pytest.raises(UserError, match=r"config.model.block='mega': reports show SeqBoat layers alone"):
        write_report(tmp_path / "run")
