"""Parameters from a run or a file: exactly what was trained, and nothing in a file is ever executed."""

import io
import json
import pickle
import re
import struct
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.training import manifest
from experiments.training.checkpoints import Checkpoints
from experiments.training.loop import evaluate, train
from experiments.training.metrics import METRICS_FILE
from experiments.training.restore import load, read_state
from tests.helpers import grid

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(2.5, np.float32)}


# A run


@pytest.fixture(params=grid(("light", "seqboat"), "light"))
def finished(request, light, built_light, tmp_path) -> Path:
    """The work directory of a trained run."""
    if request.param == "seqboat":
        return request.getfixturevalue("trained")
    built_light()
    train(light(), tmp_path / "run")
    return tmp_path / "run"


def test_a_loaded_model_evaluates_as_in_training(finished):
    """The best step by default, or the step asked for: to the last bit of every metric."""
    lines = [json.loads(line) for line in (finished / METRICS_FILE).read_text().splitlines()]
    evaluations = {line["step"]: line for line in lines if line["kind"] == "evaluation"}
    best = max(evaluations, key=lambda step: (evaluations[step]["accuracy"], -step))
    experiment = load(finished).experiment
    step = experiment.partition.evaluate(experiment.functions.evaluate)
    for asked, expected in ((None, best), (6, 6)):
        run, logged = load(finished, asked), evaluations[expected]
        assert run.step == expected
        values = evaluate(step, run.variables, run.experiment.task.evaluation_batches("validation"))
        assert values == {name: logged[name] for name in values}
        assert set(logged) - set(values) == {"step", "kind", "split"}


@pytest.fixture(scope="module")
def resumed(untrained, tiny, tmp_path_factory):
    """A run whose first half, with a window of 4, stays the best of it: the second has a window of 2."""
    workdir = tmp_path_factory.mktemp("resumed")
    untrained(tiny({"train.steps": 2, "model.window_size": 4}), workdir, 2, accuracy=1.0)
    return untrained(tiny({"train.steps": 4, "model.window_size": 2}), workdir, 4, accuracy=0.5)


@pytest.mark.breadth  # test_a_step_is_verified_once
def test_a_step_comes_with_its_own_config(resumed):
    for step, window, best in ((None, 4, True), (2, 4, True), (4, 2, False)):
        run = load(resumed, step)
        assert run.step == (step or 2)
        assert run.best is best
        assert run.model.config.encoder.layer.window_size == window
        assert run.experiment.values["model"]["window_size"] == run.meta["config"]["model"]["window_size"] == window


def test_a_step_is_verified_once(resumed, monkeypatch):
    hashed = []
    sha256 = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: hashed.append(path) or sha256(path))
    load(resumed)
    arrays = [path for path in hashed if "state" in path.parts]
    assert len(arrays) == len(set(arrays))
    assert {path.relative_to(resumed).parts[1] for path in arrays} == {"2"}


def test_paths_are_read_as_everywhere(recorded, monkeypatch):
    monkeypatch.setenv("HOME", str(recorded.parent))
    assert load(f"~/{recorded.name}", 2).step == 2
    for name in ("gs://bucket/run", "~nosuchuser/run"):
        with pytest.raises(UserError, match=f"^workdir={name}"):
            load(name)


@pytest.mark.breadth  # test_a_loaded_model_evaluates_as_in_training
def test_the_five_lines_of_the_guide(trained):
    """As written there, except for the work directory."""
    text = (Path(__file__).parents[2] / "docs/getting_started.md").read_text()
    (block,) = re.findall(r"((?:^ {4}.*\n)*^ {4}.*experiments\.load\(.*\n(?:^ {4}.*\n)*)", text, re.MULTILINE)
    lines = textwrap.dedent(block).splitlines()
    assert len(lines) == 5
    names: dict = {}
    exec("\n".join(lines).replace("runs/x", str(trained)), names)
    assert names["output"].logits.shape == (8, 10)
    assert np.isfinite(names["output"].logits).all()
    assert names["rates"].shape == (2, 1)
    assert ((names["rates"] >= 0) & (names["rates"] <= 1)).all()
    values = evaluate(
        jax.jit(names["run"].experiment.functions.evaluate), names["run"].variables, iter([names["batch"]])
    )
    np.testing.assert_allclose(names["rates"][:, 0], values["activation_rate"], rtol=1e-6)


def test_loading_writes_nothing(recorded):
    before = sorted((path, path.stat().st_mtime_ns) for path in recorded.rglob("*"))
    load(recorded)
    assert sorted((path, path.stat().st_mtime_ns) for path in recorded.rglob("*")) == before


def test_the_data_may_lie_elsewhere(recorded, tmp_path):
    assert load(recorded, data_dir=str(tmp_path)).experiment.config.data_dir == str(tmp_path)
    assert load(recorded).experiment.config.data_dir is None


def test_there_is_no_run(recorded, tmp_path):
    with pytest.raises(UserError, match=r"there is no work directory .*nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"there is no checkpoint directory .*checkpoints: was this run ever started"):
        load(tmp_path)
    for run in ("arm/seed_0", "seed_1"):
        (tmp_path / "sweep" / run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoints: name one of the runs in it, arm/seed_0, seed_1$"):
        load(tmp_path / "sweep")
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*; there are \[2, 4, 6\]"):
        load(recorded, 3)


@pytest.mark.parametrize("meta", [{}, {"config": None}, {"config": [1]}])
def test_a_checkpoint_without_a_config(tmp_path, meta):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": np.ones(2, np.float32)}, meta)
    with pytest.raises(UserError, match="holds no config: was it made by another program"):
        load(tmp_path)


def test_a_config_of_another_version(recorded, tmp_path):
    config = Checkpoints(recorded / "checkpoints", read_only=True).read_meta()["config"]
    config["model"]["depth"] = 3
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": np.ones(2, np.float32)}, {"config": config})
    with pytest.raises(UserError, match=r"config\.model\.depth: unknown field"):
        load(tmp_path)


# Files


def assert_arrays(state: dict[str, np.ndarray]) -> None:
    assert set(state) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert type(state[name]) is np.ndarray
        assert state[name].dtype == np.float32
        np.testing.assert_array_equal(state[name], array)


def assert_one_line(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        read_state(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600
    for part in parts:
        assert part in message


def test_npz(tmp_path):
    np.savez(tmp_path / "state.npz", **ARRAYS)
    assert_arrays(read_state(tmp_path / "state.npz"))


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file(ARRAYS, tmp_path / "state.safetensors")
    assert_arrays(read_state(tmp_path / "state.safetensors"))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["state dict", "fairseq checkpoint"])
def test_torch(tmp_path, suffix, wrapped):
    torch = pytest.importorskip("torch", reason="PyTorch is optional: it only reads .pt files")
    state = {name: torch.from_numpy(np.array(array)) for name, array in ARRAYS.items()}
    torch.save({"model": state} if wrapped else state, tmp_path / f"state{suffix}")
    assert_arrays(read_state(tmp_path / f"state{suffix}"))


class Tensor:
    """What is used of PyTorch's, which is optional: numpy does not know bfloat16, nor tensors that have gradients."""

    def __init__(self, array, detached=False):
        self.array, self.detached = array, detached

    def is_floating_point(self):
        return jnp.issubdtype(self.array.dtype, jnp.floating)

    def detach(self):
        return Tensor(self.array, True)

    def float(self):
        return Tensor(self.array.astype(np.float32), self.detached)

    def numpy(self):
        assert self.detached or not self.is_floating_point()
        return self.array


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model_state_dict": state},
        lambda state: {"step": 3, "model": {"state_dict": state}},
    ],
)
def test_torch_files_of_any_trainer(tmp_path, monkeypatch, wrap):
    state = {"weight": Tensor(np.ones((2, 3), jnp.bfloat16)), "steps": Tensor(np.array(5))}
    torch = types.SimpleNamespace(Tensor=Tensor, load=lambda path, map_location, weights_only: wrap(state))
    monkeypatch.setitem(sys.modules, "torch", torch)
    arrays = read_state(tmp_path / "state.PT")
    assert arrays["weight"].dtype == np.float32
    assert arrays["steps"] == 5
    assert arrays["steps"].dtype == np.int64


@pytest.mark.parametrize("suffix", [".NPZ", ".Npz"])
def test_a_suffix_may_be_written_in_capitals(tmp_path, suffix):
    with (tmp_path / f"state{suffix}").open("wb") as file:
        np.savez(file, **ARRAYS)
    assert_arrays(read_state(tmp_path / f"state{suffix}"))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_safetensors_of_half_precision(tmp_path, kind):
    from safetensors.numpy import save_file

    save_file({"x": np.arange(3).astype(jnp.dtype(kind)), "n": np.array(3)}, tmp_path / "state.Safetensors")
    state = read_state(tmp_path / "state.Safetensors")
    assert state["x"].dtype == kind
    np.testing.assert_array_equal(state["x"].astype(np.float32), [0, 1, 2])
    assert state["n"].shape == ()


def test_a_torch_file_of_something_else(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is optional: it only reads .pt files")
    for content in ([1, 2], {"epoch": 3}, {"model": {"x": 1}}):
        torch.save(content, tmp_path / "state.pt")
        assert_one_line(tmp_path / "state.pt", "holds no state dict: expected a mapping of names to tensors")


def test_torch_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "state.pt").write_bytes(b"x")
    assert_one_line(tmp_path / "state.pt", "reading it needs the package torch; pip install torch")


def test_unknown_kinds_of_file(tmp_path):
    for name in ("state.bin", "state.npy", "state"):
        (tmp_path / name).write_bytes(b"x")
        assert_one_line(tmp_path / name, "expected one of .npz, .safetensors, .pt, .pth")


def zip_of(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npz_of(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


WHOLE = npz_of(x=np.arange(1000.0))
BROKEN = {
    "empty": b"",
    "text": b"no array\n" * 20,
    "cut short": WHOLE[:200],
    "flipped": flipped(WHOLE, len(WHOLE) // 2),
    "member is not an array": zip_of(x=b"hello"),
    "header is code": zip_of(x=b"\x93NUMPY\x01\x00" + struct.pack("<H", 40) + b"__import__('os').getcwd()".ljust(40)),
    "size beyond memory": zip_of(
        x=b"\x93NUMPY\x01\x00"
        + struct.pack("<H", 118)
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999999,), }".ljust(117)
        + b"\n"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")  # numpy leaves a failed file to gc
def test_broken_npz_files(tmp_path, name):
    (tmp_path / "state.npz").write_bytes(BROKEN[name])
    assert_one_line(tmp_path / "state.npz", "cannot be read: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text" * 10,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 70) + b'{"x":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}'.ljust(70) + b"short",
    ],
    ids=["empty", "text", "header beyond the file", "header is a list", "data cut short"],
)
def test_broken_safetensors_files(tmp_path, data):
    (tmp_path / "state.safetensors").write_bytes(data)
    assert_one_line(tmp_path / "state.safetensors", "cannot be read: ")


@pytest.mark.parametrize("data", [b"", b"text" * 10, WHOLE[:200]], ids=["empty", "text", "half a zip"])
def test_broken_torch_files(tmp_path, data):
    pytest.importorskip("torch", reason="PyTorch is optional: it only reads .pt files")
    (tmp_path / "state.pt").write_bytes(data)
    assert_one_line(tmp_path / "state.pt", "cannot be read: ")


def test_a_file_that_is_not_there(tmp_path):
    for suffix in (".npz", ".safetensors"):
        assert_one_line(tmp_path / f"nothing{suffix}")


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_evil_pickle_would_act(tmp_path):
    """So that the tests below can fail: what a reader that unpickles would call."""
    function, arguments = Evil(tmp_path / "executed").__reduce__()
    function(*arguments)
    assert (tmp_path / "executed").exists()


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    target = tmp_path / "executed"
    np.savez(tmp_path / "state.npz", good=np.ones(2), evil=np.array([Evil(target)], dtype=object))
    assert_one_line(tmp_path / "state.npz", "cannot be read: ")
    (tmp_path / "state.npz").write_bytes(pickle.dumps(Evil(target)))  # numpy takes any other file for a pickle
    assert_one_line(tmp_path / "state.npz", "cannot be read: ")
    assert not target.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_an_evil_torch_file_is_not_unpickled(tmp_path, protocol):
    """Without PyTorch nothing reads it, with it a reader that executes nothing: either way one line."""
    target = tmp_path / "executed"
    evil = pickle.dumps({"model": Evil(target)}, protocol=protocol)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("state/data.pkl", evil)
        file.writestr("state/version", "3\n")
        file.writestr("state/byteorder", "little")
    for data in (evil, archive.getvalue()):
        (tmp_path / "state.pt").write_bytes(data)
        assert_one_line(tmp_path / "state.pt")
    assert not target.exists()
