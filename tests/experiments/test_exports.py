"""A model in one file: what was exported is what is loaded, and no byte of a file is trusted."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import experiments
from configs.lm import bytes as recipe
from experiments.common.errors import UserError
from experiments.common.files import sha256
from experiments.evaluation.evaluator import result_file
from experiments.reports.export import Card, export, render, results
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import build
from experiments.training.exports import METADATA, Exported, digest, is_export, named, write
from experiments.training.metrics import METRICS_FILE
from experiments.training.restore import beside, initial_variables, load, load_generator
from seqboat.version import CHECKPOINT_FORMAT
from tests.helpers import SMALL_MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory, untrained) -> Path:
    """A language model, step 3, exported to model.safetensors; its text is gone."""
    tmp = tmp_path_factory.mktemp("exports")
    (tmp / "text.txt").write_bytes(b"A text of no more than a few bytes. " * 20)
    config = recipe.get_config("credit_router,tiny")
    small = {"task.files": (str(tmp / "text.txt"),), "task.length": 32, "task.context": 16}
    config.update_from_flattened_dict({**SMALL_MODEL, **small, "train.batch_size": 2, "data_dir": str(tmp)})
    untrained(config.to_dict(), tmp / "run", 3, bits_per_byte=1.0)
    (tmp / "text.txt").rename(tmp / "moved.txt")
    export(tmp / "run", tmp / "model.safetensors")
    return tmp


@pytest.fixture
def model(folder) -> Path:
    return folder / "model.safetensors"


def content(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return load_file(path), json.loads(header["__metadata__"][METADATA])


def forge(path: Path, arrays: dict[str, np.ndarray], meta: Any, seal: bool = True) -> Path:
    """A file with these contents, whose digest is right if `seal`."""
    if seal:
        meta = {name: value for name, value in meta.items() if name != "sha256"}
        meta["sha256"] = digest(meta, arrays)
    save_file(arrays, path, {METADATA: meta if isinstance(meta, str) else json.dumps(meta)})
    return path


def assert_one_line(path: Path, *parts: str, loading: Any = load) -> None:
    with pytest.raises(UserError) as caught:
        loading(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for part in (str(path), *parts):
        assert part in message


def test_what_was_exported_is_loaded(folder, model):
    run, whole = experiments.load(model), load(folder / "run")
    assert (run.model, run.step, run.best) == (whole.model, 3, True)
    jax.tree.map(np.testing.assert_array_equal, run.variables, whole.variables)
    assert jax.tree.structure(run.variables) == jax.tree.structure(whole.variables)
    generator = load_generator(model)
    assert (generator.model, generator.step) == (run.model, 3)
    jax.tree.map(np.testing.assert_array_equal, generator.variables, run.variables)
    assert len({leaf.sharding for leaf in jax.tree.leaves((generator.variables, whole.variables))}) == 1


@pytest.mark.breadth  # golden/test_export.py: a file is loaded, and computes whole and in pieces
def test_the_lines_of_the_guide(model):
    """As written there, except for the file; the inputs are the reader's."""
    text = (Path(__file__).parents[2] / "docs/export.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {"inputs": jnp.ones((1, 4), jnp.int32), "lengths": jnp.array([4])}
    exec(block.replace("model.safetensors", str(model)), names)
    assert names["output"].logits.shape == (1, 4, 257)
    assert np.isfinite(names["output"].logits).all()
    assert names["state"]


def test_a_file_computes_without_data_and_finds_them_again(folder, model):
    with pytest.raises(UserError, match=r"there is no regular file text\.txt"):
        _ = experiments.load(model).task
    (folder / "there").mkdir()
    (folder / "there/text.txt").write_bytes((folder / "moved.txt").read_bytes())
    run = experiments.load(model, data_dir=str(folder / "there"))
    assert run.data_changes == []
    assert run.task.bytes["train"].size


def test_a_file_names_no_place_of_this_machine(folder, model):
    arrays, meta = content(model)
    assert str(folder) not in json.dumps(meta)
    assert meta["config"]["task"]["files"] == ["text.txt"]
    assert set(arrays) == set(named(load(model).variables))


def test_training_starts_from_a_file(folder, model, tiny):
    values = load(folder / "run").values
    experiment = build({**values, "task": {**values["task"], "files": (str(folder / "moved.txt"),)}})
    taken = initial_variables(experiment, model)
    jax.tree.map(np.testing.assert_array_equal, taken, load(model).variables)
    with pytest.raises(UserError, match=r"model.safetensors does not fit this model: params/embedding/"):
        initial_variables(build(tiny()), model)


def test_two_exports_are_equal_and_replace_each_other(folder, model):
    before = model.read_bytes()
    export(model, model)
    assert model.read_bytes() == before
    assert not list(folder.glob("*.partial"))


def test_other_files_are_not_overwritten(folder, model, tmp_path):
    save_file({"x": np.ones(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "notes.md").write_text("mine")
    for name, message in {
        "foreign.safetensors": "exists and is not an export",
        "text.safetensors": "exists and is not an export",
        "folder.safetensors": "exists and is not an export",
        "notes.safetensors": "notes.md, where the model card goes, is another file",
        "model.npz": "expected a name that ends with .safetensors",
        "nothing/model.safetensors": "could not write in",
    }.items():
        with pytest.raises(UserError, match=message):
            export(model, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder.safetensors",
        "foreign.safetensors",
        "notes.md",
        "text.safetensors",
    ]


def test_a_step_that_is_not_in_it(model):
    assert load(model, 3).step == 3
    assert_one_line(model, "--step=4", "holds step 3 alone", loading=lambda path: load(path, 4))


# Broken and hostile files


def test_every_changed_byte_is_noticed(model, tmp_path):
    whole = model.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(0)
    places = [0, 5, 9, *rng.integers(8, start, 60), *rng.integers(start, len(whole), 20)]
    for place in places:
        path = tmp_path / "flipped.safetensors"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_one_line(path, loading=lambda path: Exported(path).verify())
    for size in (0, 7, 100, start, len(whole) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:size])
        assert_one_line(path, "cannot be read")


def test_files_of_others(tmp_path):
    save_file({"encoder.weight": np.ones((2, 2), np.float32)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    assert_one_line(tmp_path / "foreign.safetensors", "was not written by experiments.export", "--init_from takes")
    assert not is_export(tmp_path / "foreign.safetensors")
    assert_one_line(tmp_path / "nothing.safetensors", "there is no file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{" * 100_000, "cannot be read"),
        ('{"config": NaN}', "NaN is not JSON"),
        ("[]", "'config' of its metadata is not of type dict"),
        ("null", "'config' of its metadata is not of type dict"),
        ('{"step": ' + "9" * 5000 + "}", "cannot be read"),
    ],
    ids=["empty", "deep", "NaN", "list", "null", "digits"],
)
def test_absurd_metadata(tmp_path, text, message):
    assert_one_line(forge(tmp_path / "x.safetensors", {}, text, seal=False), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step -1"),
        ({"step": True}, "'step' of its metadata is not of type int"),
        ({"names": "theirs"}, "unknown names"),
        ({"format": "other"}, "was not written by seqboat"),
        ({"format_version": CHECKPOINT_FORMAT + 1}, "update seqboat"),
        ({"format_version": "2"}, "was not written by seqboat"),
        ({"versions": [1]}, "'versions' of its metadata is not of type dict"),
        ({"names": "published"}, "published names are of classifiers"),
        ({"config": {}}, "missing"),
    ],
)
def test_metadata_of_the_wrong_kind(model, tmp_path, changes, message):
    arrays, meta = content(model)
    with pytest.raises(UserError, match=message):
        load(forge(tmp_path / "x.safetensors", arrays, {**meta, **changes}))


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("task", "name", "os"),
        ("task", "name", "..base"),
        ("task", "name", "base"),
        ("task", "length", 2**40),
        ("model", "name", "__import__('os')"),
        ("model", "features", 2**29),
        ("model", "layers", 10**9),
        ("model", "key_size", -1),
        ("model", "window_size", "4"),
        ("model", "depth", 3),
        ("model", "encoder", {}),
        ("model", "dtype", "object"),
        ("optimizer", "learning_rate", {}),
        ("train", "steps", 1e999),
    ],
)
def test_hostile_configs(model, tmp_path, group, field, value):
    arrays, meta = content(model)
    meta["config"][group][field] = value if value != 1e999 else 10**400
    with pytest.raises(UserError) as caught:
        load(forge(tmp_path / "x.safetensors", arrays, meta))
    assert "\n" not in str(caught.value)


def test_arrays_that_do_not_fit(model, tmp_path):
    arrays, meta = content(model)
    first = min(arrays)
    for changed, message in (
        ({name: array for name, array in arrays.items() if name != first}, f"{first} .* is missing in it"),
        ({**arrays, "params/more": np.ones(2)}, r"params/more \(2,\) float64 is only in it"),
        ({**arrays, first: arrays[first][None]}, f"{first} is .* in it, .* here"),
        ({**arrays, first: arrays[first].astype(np.float16)}, "float16 in it, .* float32 here"),
        ({}, "0 numbers in all"),
    ):
        with pytest.raises(UserError, match=message):
            load(forge(tmp_path / "x.safetensors", changed, meta))


def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    arrays, meta = content(model)
    with pytest.raises(UserError, match=r"could not write .*x\.safetensors: No space left on device"):
        write(tmp_path / "x.safetensors", arrays, meta)
    assert list(tmp_path.iterdir()) == []


# The published names


@pytest.fixture(scope="module")
def digits(tmp_path_factory, untrained, tiny) -> Path:
    """A classifier of numbers with a centered router."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    changes = {"model.head": "linear", "model.norm": "batch", "model.router.centered": True}
    values = {**tiny(changes), "task": {"name": "digits"}}
    return untrained(values, tmp_path_factory.mktemp("published") / "run", 2)


@pytest.mark.breadth  # tests/interop/test_published.py
def test_published_names_are_read_back_as_the_same_function(digits, tmp_path):
    path, card = export(digits, tmp_path / "theirs.safetensors", published=True)
    theirs = load_file(path)
    assert theirs["encoder.weight"].shape == (8, 64)
    assert theirs["seq_layers.1.hx_proj.weight"].shape == (2 + 8, 8)
    assert "SeqBoatModel(d_input=64, d_output=10, d_model=8, n_layers=2, dropout=0.0, prenorm=False" in card.read_text()
    run, whole = load(path), load(digits)
    assert whole.model.config.encoder.layer.router.centered
    assert not run.model.config.encoder.layer.router.centered
    batch = next(whole.task.evaluation_batches("test"))
    logits = [jax.jit(r.model.apply)(r.variables, batch["inputs"], batch["lengths"]).logits for r in (run, whole)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert np.abs(logits[0]).max() > 0.1


def test_models_without_a_published_form(folder, tmp_path, untrained, tiny):
    for source, message in (
        (folder / "run", "the published model is a classifier, not a LanguageModel"),
        (untrained(tiny(), tmp_path / "run"), "the published model takes numbers, without a sinusoid"),
    ):
        with pytest.raises(UserError, match=f"^--names=published: {message}"):
            export(source, tmp_path / "x.safetensors", published=True)
    assert not list(tmp_path.glob("x.*"))


# The card


def test_the_card_shows_metrics_and_activation_rates(folder, tmp_path):
    run = folder / "run"
    record = {"step": 3, "kind": "evaluation", "split": "validation", "loss": 0.5, "bits_per_byte": 0.25}
    record |= {"activation_rate": [[0.5, 0.125], [1.0, 0.0]], "confidence": [[0.75, 0.5], [0.5, None]]}
    (run / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in (record, {**record, "step": 4})))
    evaluated = {"step": 3, "split": "test", "at": None, "protocol": "one | line", "loss": 0.75, "seal": "other"}
    (run / result_file(evaluated)).write_text(json.dumps(evaluated))
    text = export(run, tmp_path / "m.safetensors")[1].read_text()
    assert "| validation | in training | bits_per_byte | 0.2500 |" in text
    assert "| 2 | 1.000, 0.000 | 0.500, nan |" in text
    assert "one | line" not in text  # of another checkpoint
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [3]
    (run / METRICS_FILE).unlink()


def test_an_evaluation_of_a_file_is_in_its_card(model):
    found = {"step": 3, "split": "test", "at": None, "protocol": "one | line", "loss": 0.75, "seal": ""}
    path = beside(model, result_file(found))
    assert path.name == "model.evaluation_test_3.json"
    for seal, count in (("", 0), (sha256(model), 1)):
        path.write_text(json.dumps({**found, "seal": seal, "standard_errors": {"loss": 0.5}}))
        rows = list(results(model, 3))
        assert len(rows) == count
    text = render(Card(load(model), {}, model.name, tuple(rows), {}, None))
    assert r"| test | one \| line | loss | 0.7500 | 0.5000 |" in text
    assert "The run recorded no activation rates.\n" in text
