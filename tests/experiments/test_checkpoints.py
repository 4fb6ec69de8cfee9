"""Checkpoints: what is saved is what is read, and nothing else is ever taken for a checkpoint."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging

from experiments.common.errors import UserError
from experiments.training import checkpoints as checkpoints_module
from experiments.training import manifest
from experiments.training.checkpoints import Checkpoints
from experiments.training.optimizers import AdamState, MomentumState
from seqboat import version
from tests.helpers import grid

META = {"config": {"width": 4, "windows": [1, 2]}, "versions": {"jax": jax.__version__}}
REPOSITORY = Path(__file__).parents[2]


@flax.struct.dataclass
class State:
    """The fields of the state of a run, and a typed key."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    metrics: Any
    bad_step: Any
    key: Any


def make_state(step: int = 0, width: int = 4) -> State:
    params = {
        "layer": {"kernel": jnp.full((3, width), step, jnp.float32), "bias": jnp.full((width,), step, jnp.bfloat16)}
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(
        step=jnp.int32(step),
        params=params,
        batch_stats={"norm": {"mean": jnp.full((width,), -step, jnp.float32)}},
        opt_state=optimizer.init(params),
        metrics=None,
        bad_step=jnp.asarray(False),
        key=jax.random.key(step),
    )


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(e, np.float64))


def save_steps(directory: Path, *steps: int, **options: Any) -> None:
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), META)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    save_steps(directory, 10, 20, 30)
    return directory


@pytest.fixture
def run(three_steps: Path, tmp_path: Path) -> Path:
    """A copy of a run with steps 10, 20 and 30, to be damaged."""
    return Path(shutil.copytree(three_steps, tmp_path / "run"))


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reseal(folder: Path) -> None:
    """Makes the seal that of the files as they are: what someone who forges a checkpoint would do."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": manifest.sha256(path),
        }
        for item in ("meta", "state")
        for path in (folder / item).rglob("*")
        if path.is_file()
    }
    edit_json(folder / "seal.json", files=files)


# Saving and reading back


def test_round_trip(tmp_path: Path) -> None:
    state = make_state(7)
    with Checkpoints(tmp_path / "new" / "folder", best_metric="accuracy") as checkpoints:
        assert checkpoints.restore_latest(abstract(state)) is None
        assert checkpoints.best_step() is None
        assert checkpoints.save(7, state, META, {"accuracy": jnp.float32(0.5)})
        assert not checkpoints.save(7, state, META)
        assert checkpoints.steps() == [7]
        restored = checkpoints.restore_latest(abstract(state))
        assert restored is not None
        assert restored.step == 7
        assert_same(restored.state, state)
        assert restored.meta == {**META, "format": "seqboat", "format_version": version.CHECKPOINT_FORMAT}
        assert checkpoints.read_meta(7) == checkpoints.read_meta() == restored.meta
        assert checkpoints.save(8, state, META)  # the manager is made anew after a restore
    assert_same(Checkpoints(tmp_path / "new/folder").restore(8, abstract(state)).state, state)


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_steps(Path("relative"), 1)
    assert Checkpoints("relative").steps() == [1]


def test_state_may_be_donated_after_save(tmp_path: Path) -> None:
    """The next steps overwrite the buffers of the state while it is written; the checkpoint holds what was saved."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {"x": jnp.arange(2.0**20)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, META)
        x = state["x"]
        for _ in range(20):
            x = step(x)
        x.block_until_ready()
        checkpoints.wait()
        restored = checkpoints.restore(1, {"x": jax.ShapeDtypeStruct((2**20,), jnp.float32)})
    np.testing.assert_array_equal(restored.state["x"], np.arange(2.0**20))
    np.testing.assert_array_equal(x, np.arange(2.0**20) + 20)


def test_every_file_of_the_items_is_sealed_with_the_commit(run: Path) -> None:
    files = json.loads((run / "20/seal.json").read_text())["files"]
    present = {p.relative_to(run / "20").as_posix() for i in ("meta", "state") for p in (run / "20" / i).rglob("*")}
    assert set(files) == {name for name in present if (run / "20" / name).is_file()}
    assert len(files) > 5


def test_restores_onto_the_sharding_asked_for(run: Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state())
    restored = Checkpoints(run).restore(30, wanted)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored.state.params))


def test_saving_backwards_is_refused(run: Path) -> None:
    assert not Checkpoints(run).save(20, make_state(), META)
    with Checkpoints(run) as checkpoints, pytest.raises(UserError, match=r"cannot save step 25: .* holds step 30"):
        checkpoints.save(25, make_state(), META)


# What is kept


@pytest.mark.parametrize(
    ("higher", "values", "best"),
    [
        (True, {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.1}, 2),
        (False, {1: 0.5, 2: 0.1, 3: 0.1, 4: float("-inf"), 5: 0.4}, 2),
        (True, {1: None, 2: 0.0, 3: None, 4: None, 5: None}, 2),
    ],
)
def test_keeps_the_last_and_the_first_best(tmp_path: Path, higher: bool, values: dict, best: int) -> None:
    options: dict = {"keep": 1, "best_metric": "m", "higher_is_better": higher}
    for steps in ([1, 2, 3], [4, 5]):  # the best is remembered by a new process
        with Checkpoints(tmp_path, **options) as checkpoints:
            for step in steps:
                metrics = None if values[step] is None else {"m": values[step]}
                checkpoints.save(step, {"x": jnp.ones(3)}, META, metrics)
            checkpoints.wait()
            assert checkpoints.best_step() == best
            assert checkpoints.steps() == [best, steps[-1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]


def test_keeps_the_last_without_a_metric(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, keep=2)
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert Checkpoints(tmp_path, best_metric="m").best_step() is None


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 given"):
        Checkpoints(tmp_path, keep=0)
    with (
        Checkpoints(tmp_path, best_metric="acuracy") as checkpoints,
        pytest.raises(UserError, match=r"'acuracy'.*'accuracy'"),
    ):
        checkpoints.save(1, {"x": jnp.ones(3)}, META, {"accuracy": 1.0})


def test_unusable_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory"):
        Checkpoints(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"^checkpoints=gs://bucket/run: expected .* not a URL"):
        Checkpoints("gs://bucket/run")
    with pytest.raises(UserError, match="no checkpoint directory"):
        Checkpoints(tmp_path / "missing", read_only=True)

    def read_only_mount(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoints_module.tempfile, "TemporaryFile", read_only_mount)
    with pytest.raises(UserError, match=r"cannot write checkpoints in .*: Read-only file system"):
        Checkpoints(tmp_path)


# Whose directory it is


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as first:
        who = rf"{re.escape(str(tmp_path))} is in use by process {os.getpid()} on \S+ since 20.*: wait for its end"
        with pytest.raises(UserError, match=who), Checkpoints(tmp_path):
            pass
        with pytest.raises(UserError, match="in use by process"):
            Checkpoints(tmp_path).save(1, {"x": jnp.ones(3)}, META)
        first.save(1, {"x": jnp.ones(3)}, META)
        first.wait()
        assert Checkpoints(tmp_path, read_only=True).read_meta()["config"] == META["config"]  # readers are free
    save_steps(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_failed_run_frees_its_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path):
        _ = 1 / 0
    save_steps(tmp_path, 1)


# A name with a meaning


@pytest.mark.parametrize("name", ["x[1]", "[a]/b", "a\\b", "*", "?[!x]"])
def test_names_that_are_patterns(tmp_path: Path, name: str) -> None:
    (tmp_path / "x1").mkdir()
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path / name / "checkpoints", keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, META)
        checkpoints.wait()
        assert checkpoints.steps() == [2]
    restored = Checkpoints(tmp_path / name / "checkpoints", read_only=True).restore_latest(abstract(state))
    assert restored is not None
    assert_same(restored.state, state)


def test_what_cannot_be_read_back_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.PyTreeCheckpointHandler, "metadata", lambda *_: 1 / 0)
            checkpoints.save(2, make_state(2), META)
            with pytest.raises(UserError, match=r"step 2 to .* cannot be read back: division by zero; .* is step 1;"):
                checkpoints.wait()
        assert checkpoints.save(2, make_state(2), META)
    assert Checkpoints(tmp_path).steps() == [1, 2]


# Damage


def newest_file(folder: Path, item: str) -> Path:
    """The largest file of an item: for the state, a chunk of arrays."""
    return max((path for path in (folder / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(folder: Path) -> None:
    path = newest_file(folder, "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def escape(name: str):
    """The seal names a file outside the checkpoint, with its right size and sum."""

    def damage(folder: Path) -> None:
        target = folder.parent / "10/seal.json"
        entry = {"size": target.stat().st_size, "sha256": manifest.sha256(target)}
        files = json.loads((folder / "seal.json").read_text())["files"]
        edit_json(folder / "seal.json", files={**files, name.format(target=target): entry})

    return damage


def link_outside(folder: Path) -> None:
    path = newest_file(folder, "state")
    outside = folder.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


DAMAGES = {
    "flipped byte": (flip_a_byte, "has changed"),
    "changed meta": (lambda f: edit_json(f / "meta/metadata", config={"width": 5}), "bytes instead of"),
    "truncated": (lambda f: os.truncate(newest_file(f, "state"), 20), "20 bytes instead of"),
    "deleted file": (lambda f: newest_file(f, "state").unlink(), "is missing"),
    "deleted items": (lambda f: (shutil.rmtree(f / "state"), shutil.rmtree(f / "meta")), "is missing"),
    "no seal": (lambda f: (f / "seal.json").unlink(), "seal.json is missing"),
    "empty": (empty, "it is empty"),
    "half a seal": (lambda f: os.truncate(f / "seal.json", 100), "cannot be verified"),
    "seal of a list": (lambda f: (f / "seal.json").write_text("[1]"), "holds a list"),
    "seal of binary": (lambda f: (f / "seal.json").write_bytes(b"\xff\x00"), "cannot be verified"),
    "deep seal": (lambda f: (f / "seal.json").write_text("[" * 100_000), "nested too deeply"),
    "seal of no files": (lambda f: edit_json(f / "seal.json", files={}), "not the seal of this step"),
    "seal of another step": (lambda f: shutil.copy(f.parent / "20/seal.json", f), "not the seal of this step"),
    "malformed entry": (lambda f: edit_json(f / "seal.json", files={"meta/metadata": 3}), "malformed"),
    "relative escape": (escape("../10/seal.json"), "outside the checkpoint"),
    "absolute escape": (escape("{target}"), "outside the checkpoint"),
    "zero in a name": (escape("a\0b"), "cannot be verified"),
    "link": (link_outside, "outside the checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(run: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(run / "30")
    with pytest.raises(UserError, match=rf"step 30 in .* is damaged: .*{reason}") as caught:
        Checkpoints(run, read_only=True).read_meta(30)
    assert "\n" not in str(caught.value)
    assert (run / "30").exists()


# test_damage_is_named
@pytest.mark.parametrize("name", grid(tuple(DAMAGES), "flipped byte", "no seal", "link"))
def test_a_damaged_step_is_quarantined_and_the_previous_one_is_used(run: Path, warned: list[str], name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(run / "30")
    with pytest.raises(UserError, match=rf"step 30 in .* is damaged: .*{reason}"):
        Checkpoints(run).restore(30, abstract(make_state()))
    reader = Checkpoints(run, read_only=True)
    assert reader.restore_params(None, abstract(make_state().params)).step == 20
    assert (run / "30").exists()
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.restore_latest(abstract(make_state()))
        assert restored is not None
        assert restored.step == 20
        assert_same(restored.state, make_state(20))
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.save(30, make_state(30), META)
        checkpoints.wait()
        assert checkpoints.restore(30, abstract(make_state())).step == 30
    assert [path.name for path in (run / "damaged").iterdir()] == ["30-0"]
    assert len(warned) == 2
    assert reason in warned[1]
    assert "using step 20 instead" in warned[1]
    assert "\n" not in warned[1]


def test_a_flipped_byte_anywhere_is_found_or_harmless(run: Path) -> None:
    files = sorted(path for path in (run / "30").rglob("*") if path.is_file() and path.stat().st_size)
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        if path.parent == run / "30" and path.name != "seal.json":  # of orbax, not read by us
            assert Checkpoints(run).read_meta(30)["config"] == META["config"]
        else:
            with pytest.raises(UserError, match="is damaged"):
                Checkpoints(run).read_meta(30)
        path.write_bytes(data)
    assert Checkpoints(run).read_meta(30)["config"] == META["config"]


def change_the_score(folder: Path) -> None:
    edit_json(folder / "seal.json", metrics={"m": 0.0})


OF_THE_BEST = {
    "changed score": change_the_score,
    "no seal": lambda f: (f / "seal.json").unlink(),
    "half a seal": lambda f: os.truncate(f / "seal.json", 40),
    "no score": lambda f: edit_json(f / "seal.json", metrics={}),
    "another step": lambda f: edit_json(f / "seal.json", step=3),
    "flipped byte": flip_a_byte,
    "other meta": lambda f: (f / "meta/metadata").write_text('{"format": "seqboat"}'),
}


# test_damage_is_named
@pytest.mark.parametrize("damage", grid(OF_THE_BEST, "changed score", "no seal"))
def test_what_is_deleted_does_not_follow_from_damage(tmp_path: Path, warned: list[str], damage: Any) -> None:
    """Step 1 is the best one. Damaged, it is kept for its owner, as the next best of those that can be read is."""
    options: dict = {"keep": 1, "best_metric": "m"}
    with Checkpoints(tmp_path, keep=3, best_metric="m") as checkpoints:
        for step, value in ((1, 0.9), (2, 0.5), (3, 0.1)):
            checkpoints.save(step, make_state(step), META, {"m": value})
    damage(tmp_path / "1")
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state())).step == 3  # type: ignore[union-attr]
        checkpoints.save(4, make_state(4), META, {"m": 0.2})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.best_step() == 2
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["1-0"]
    assert any("step 1 in" in line and "may be the best one" in line for line in warned)


def test_a_changed_score_is_not_ranked_and_said_once(tmp_path: Path, warned: list[str]) -> None:
    with Checkpoints(tmp_path, best_metric="m") as checkpoints:
        for step, value in ((1, 0.9), (2, 0.5)):
            checkpoints.save(step, make_state(step), META, {"m": value})
    reader = Checkpoints(tmp_path, best_metric="m", read_only=True)
    assert reader.best_step() == 1
    change_the_score(tmp_path / "1")
    assert [reader.best_step(), reader.best_step()] == [2, 2]
    assert len(warned) == 1
    assert "seal.json has changed" in warned[0]
    with pytest.raises(UserError, match=r"step 1 in .* is damaged: seal.json has changed"):
        reader.read_meta(1)


def test_a_seal_without_its_own_digest_is_read(tmp_path: Path) -> None:
    """Those of earlier versions."""
    with Checkpoints(tmp_path, best_metric="m") as checkpoints:
        checkpoints.save(1, make_state(1), META, {"m": 0.5})
    seal = json.loads((tmp_path / "1/seal.json").read_text())
    del seal["sha256"]
    (tmp_path / "1/seal.json").write_text(json.dumps(seal))
    reader = Checkpoints(tmp_path, best_metric="m", read_only=True)
    assert reader.best_step() == 1
    assert reader.restore(1, abstract(make_state())).step == 1


def test_no_step_is_hashed_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    sha256 = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: hashed.append(path) or sha256(path))
    reader = Checkpoints(run, read_only=True)
    reader.glance()
    assert len(hashed) == 1
    reader.read_meta(30)
    before = len(hashed)
    reader.restore(30, abstract(make_state()))
    assert len(hashed) == before


def test_damaged_twice(run: Path, warned: list[str]) -> None:
    for _ in range(2):
        flip_a_byte(run / "30")
        with Checkpoints(run) as checkpoints:
            checkpoints.restore_latest(abstract(make_state()))
            checkpoints.save(30, make_state(30), META)
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["30-0", "30-1"]


def test_all_damaged_is_never_a_fresh_start(run: Path) -> None:
    for step in (10, 20, 30):
        flip_a_byte(run / str(step))
    with pytest.raises(UserError, match="no usable checkpoint is left"):
        Checkpoints(run, read_only=True).restore_latest(abstract(make_state()))
    with pytest.raises(UserError, match=r"step 30 \(.*step 20 \(.*step 10 \(.*no usable checkpoint is left"):
        Checkpoints(run).restore_latest(abstract(make_state()))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        Checkpoints(run).restore_latest(abstract(make_state()))
    assert len(list((run / "damaged").iterdir())) == 3


def test_orbax_metadata_is_not_relied_on(run: Path) -> None:
    (run / "30/_CHECKPOINT_METADATA").write_text("{")
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state())).step == 30  # type: ignore[union-attr]
        checkpoints.save(40, make_state(40), META)
    assert Checkpoints(run).steps() == [20, 30, 40]


# Not ours, or of another config


def test_checkpoint_of_another_program(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": jnp.ones(3)}))
    for read_only in (False, True):
        with pytest.raises(UserError, match="3 was not written by seqboat"):
            Checkpoints(tmp_path, read_only=read_only).restore_latest(abstract(make_state()))
    assert (tmp_path / "3").exists()


def test_directory_with_other_content(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).restore_latest(abstract(make_state())) is None
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"other files \(thesis.tex\)"):
        Checkpoints(tmp_path).restore_latest(abstract(make_state()))


def test_other_shapes(run: Path) -> None:
    with pytest.raises(UserError, match="does not fit") as caught:
        Checkpoints(run).restore_latest(abstract(make_state(width=5)))
    text = str(caught.value)
    assert "batch_stats/norm/mean is (4,) float32 in it, (5,) float32 here" in text
    assert "and 4 more" in text
    assert "\n" not in text
    assert (run / "30").exists()


def test_other_dtype(run: Path) -> None:
    state = make_state()
    params = {"layer": {**state.params["layer"], "bias": jnp.zeros(4, jnp.float32)}}
    with pytest.raises(UserError, match=r"params/layer/bias is \(4,\) bfloat16 in it, \(4,\) float32 here; use"):
        Checkpoints(run).restore(30, abstract(state.replace(params=params)))


def test_other_tree(run: Path) -> None:
    state = make_state()
    params = {"layer": {"kernel": state.params["layer"]["kernel"], "scale": jnp.zeros(4)}}
    with pytest.raises(UserError) as caught:
        Checkpoints(run).restore(30, abstract(state.replace(params=params)))
    assert "params/layer/scale (4,) float32 is missing in it" in str(caught.value)
    assert "params/layer/bias (4,) bfloat16 is only in it" in str(caught.value)


def test_missing_step(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 11 .*\[10, 20, 30\]"):
        Checkpoints(run).restore(11, abstract(make_state()))
    with pytest.raises(UserError, match=r"no checkpoint in .* yet"):
        Checkpoints(tmp_path / "fresh").read_meta()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format 99, this seqboat reads up to 4: update seqboat"),
        ({"format_version": 0}, "no migration from 0"),
        ({"format_version": "1"}, "not written by seqboat"),
        ({"format": "other"}, "not written by seqboat"),
    ],
)
def test_other_formats_are_refused(run: Path, changes: dict, message: str) -> None:
    edit_json(run / "30/meta/metadata", **changes)
    reseal(run / "30")
    with pytest.raises(UserError, match=message):
        Checkpoints(run).restore_latest(abstract(make_state()))
    assert (run / "30").exists()


def test_meta_that_is_not_an_object(run: Path) -> None:
    (run / "30/meta/metadata").write_text("[]")
    reseal(run / "30")
    with pytest.raises(UserError, match="holds a list, not an object"):
        Checkpoints(run).read_meta(30)


def test_older_formats_are_migrated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "CHECKPOINT_FORMAT", 6)
    monkeypatch.setitem(version.MIGRATIONS, 4, lambda meta: {**meta, "trail": ["4 to 5"]})
    monkeypatch.setitem(version.MIGRATIONS, 5, lambda meta: {**meta, "trail": [*meta["trail"], "5 to 6"]})
    meta = Checkpoints(run).read_meta(30)
    assert meta["trail"] == ["4 to 5", "5 to 6"]
    assert meta["format_version"] == 6


def test_forged_state_gives_one_line(run: Path) -> None:
    for text in ("{}", "[]", '{"tree_metadata": 3}', '{"tree_metadata": {"a": 1}}'):
        (run / "30/state/_METADATA").write_text(text)
        reseal(run / "30")
        with pytest.raises(UserError) as caught:
            Checkpoints(run).restore(30, abstract(make_state()))
        assert "\n" not in str(caught.value)


# Parameters alone


def test_partial_restore(run: Path) -> None:
    state = make_state(20)
    restored = Checkpoints(run, read_only=True).restore_params(20, abstract(state.params))
    assert_same(restored.state, {"params": state.params})
    assert restored.meta["config"] == META["config"]
    restored = Checkpoints(run).restore_params(None, abstract(state.params), abstract(state.batch_stats))
    assert restored.step == 30
    assert_same(restored.state, {"params": make_state(30).params, "batch_stats": make_state(30).batch_stats})


def test_partial_restore_compares_what_it_reads(run: Path) -> None:
    with pytest.raises(UserError, match=r"params/layer/bias .* is only in it"):
        Checkpoints(run).restore_params(30, {"layer": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}})
    with pytest.raises(UserError, match=r"batch_stats/norm/mean .* is only in it"):
        Checkpoints(run).restore_params(30, abstract(make_state().params), {})


# Interruptions


FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from experiments.training.checkpoints import Checkpoints
from experiments.common.errors import UserError
small, large = ({"x": np.random.default_rng(0).random(n, np.float32)} for n in (100, 400_000))
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, small, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
checkpoints.save(2, large, {})
try:
    getattr(checkpoints, sys.argv[2])(*([] if sys.argv[2] != "save" else [3, small, {}]))
except UserError as error:
    print(error)
try:
    checkpoints.close()
except UserError:
    print("raised twice")
"""


@pytest.mark.breadth  # test_a_seal_that_cannot_be_written_leaves_no_checkpoint
@pytest.mark.parametrize(("surfaces_in", "limit"), [("wait", 400_000), ("save", 400_000), ("close", 0)])
def test_a_disk_that_is_full(tmp_path: Path, surfaces_in: str, limit: int) -> None:
    """A limit on the size of files fails where a full disk does: at 400 kB in tensorstore, at 0 in Python as well."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), surfaces_in, str(limit)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.stdout == (
        f"could not save the checkpoint of step 2 to {tmp_path}: File too large; the last good checkpoint is step 1; "
        "free some space and run the same command again\n"
    )
    assert done.stderr == ""
    assert done.returncode == 0
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        state = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((100,), jnp.float32)})
        assert state is not None
        checkpoints.save(2, state.state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # no temporary directory is left


def test_a_seal_that_cannot_be_written_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest.os, "fsync", full)
            checkpoints.save(2, make_state(2), META)
            with pytest.raises(
                UserError, match=r"step 2 to .*: No space left on device; .* is step 1; free some space"
            ):
                checkpoints.wait()
        assert not (tmp_path / "2").exists()
        assert checkpoints.save(3, make_state(3), META)
    assert Checkpoints(tmp_path).steps() == [1, 3]


def test_an_error_of_the_body_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def body() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(), META)
            _ = 1 / 0

    monkeypatch.setattr(manifest, "sha256", full)
    with pytest.raises(ZeroDivisionError):
        body()


def test_errors_that_are_not_the_disks_keep_their_type(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(1, make_state(), {"config": object()}) and checkpoints.wait()
        assert checkpoints.steps() == []


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from experiments.training import checkpoints as module
checkpoints = module.Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jnp.ones(3)}, {})
checkpoints.wait()
place = sys.argv[2]
from experiments.training import manifest
sha256 = manifest.sha256
def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if place == "before the seal":
    manifest.sha256 = kill
elif place == "in the seal":
    os.fsync = kill
else:
    os.rename = os.replace = kill
checkpoints.save(2, {"x": jnp.full(3, 2.0)}, {})
checkpoints.wait()
"""


@pytest.mark.parametrize("place", grid(("before the seal", "in the seal", "at the commit"), "in the seal"))
def test_killed_while_saving(tmp_path: Path, place: str, warned: list[str]) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), place]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
        assert restored is not None
        assert restored.step == 1
        checkpoints.save(2, restored.state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert warned == []


KILLED_AT_RANDOM = """
import sys
import numpy as np
from experiments.training.checkpoints import Checkpoints
state = {"x": np.random.default_rng(0).random(3_000_000, np.float32)}
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    for step in range(1000):
        checkpoints.save(step, state, {})
        print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3])
def test_killed_at_any_moment(tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-c", KILLED_AT_RANDOM, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 4:
                break
        time.sleep(delay)
        process.kill()
    restored = Checkpoints(tmp_path).restore_latest({"x": jax.ShapeDtypeStruct((3_000_000,), jnp.float32)})
    assert restored is not None
    assert restored.step >= 3  # step 4 was being saved
    np.testing.assert_array_equal(restored.state["x"], np.random.default_rng(0).random(3_000_000, np.float32))


def test_a_reader_leaves_a_running_save_alone(run: Path) -> None:
    (run / "40.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(run, read_only=True) as reader:
        assert reader.restore_latest(abstract(make_state())).step == 30  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="read_only"):
            reader.save(50, make_state(), META)
    assert (run / "40.orbax-checkpoint-tmp").exists()


def test_no_preemption_without_a_coordinator(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.reached_preemption()


def test_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        logging.set_verbosity(logging.INFO)
        save_steps(tmp_path, 1)
        Checkpoints(tmp_path).restore(1, abstract(make_state()))
        logging.info("ours")
    assert [record.message for record in caplog.records] == ["ours"]


def test_the_second_moment_that_momentum_once_had_is_not_read(tmp_path):
    state = dataclasses.replace(make_state(10), metrics={"loss": (jnp.ones(()), jnp.ones(()))})
    count, moment = jnp.int32(10), jax.tree.map(lambda p: 2 * p, state.params)
    old = dataclasses.replace(state, opt_state=AdamState(count, moment, moment))
    new = dataclasses.replace(state, opt_state=MomentumState(count, moment))
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(10, old, META)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert_same(checkpoints.restore(10, abstract(new)).state, new)
        other = abstract(dataclasses.replace(new, opt_state=new.opt_state._replace(first={})))
        with pytest.raises(UserError, match=r"opt_state/first/layer/bias .* is only in it"):
            checkpoints.restore(10, other)
