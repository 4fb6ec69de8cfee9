"""Series of many channels, made and from a file: groups, anomalies, areas under ROC curves, a run of StackVAE-G."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.config import to_dataclass
from experiments.common.errors import UserError
from experiments.data import packed
from experiments.evaluation import seeds
from experiments.evaluation.evaluator import evaluate_run
from experiments.tasks import series
from experiments.tasks.coupled_series import PERIODS, Config, Task, make, oscillations, pairs_in_order
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE
from experiments.training.models import build_model
from experiments.training.restore import load
from seqboat.interp.circuits import auc
from seqboat.models.stackvae import adjacency
from tests.experiments.test_resume import assert_same_run, run_until_stopped

SMALL = Config(
    channels=6, groups=2, length=8, train_elements=300, validation_elements=60, test_elements=400, anomalies=10, span=12
)

SCORES, KINDS = ("auroc", "neighbour_auroc"), ("", "_shift", "_uncoupled")


def task(config: Config = SMALL, **batching: int) -> Task:
    return Task(config, **{"batch_size": 16, "seed": 3, **batching})


def test_channels_of_a_group_share_a_signal_and_others_do_not():
    series = make(Config(channels=8, groups=2, train_elements=4000, coupling=0.7))
    x = series.parts["train"]
    assert {split: part.shape for split, part in series.parts.items()} == {
        "train": (4000, 8),
        "validation": (2048, 8),
        "test": (4096, 8),
    }
    np.testing.assert_allclose([x.mean(0), x.std(0)], [[0] * 8, [1] * 8], atol=1e-5)
    assert sorted(series.groups) == [0] * 4 + [1] * 4
    k, together = np.corrcoef(x.T), series.groups[:, None] == series.groups[None]
    off = ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(k[together & off], 0.7, atol=0.1)
    np.testing.assert_allclose(k[~together], 0, atol=0.2)


def test_oscillations_have_their_period_and_a_variance_of_one():
    x = oscillations(np.random.default_rng(0), np.array(PERIODS), 40_000)
    np.testing.assert_allclose(x.var(0), 1, atol=0.1)
    for column, period in zip(x.T, PERIODS, strict=True):
        power = np.abs(np.fft.rfft(column - column.mean())) ** 2
        smooth = np.convolve(power, np.ones(401) / 401, "same")
        assert len(column) / smooth.argmax() == pytest.approx(period, rel=0.2)


def test_anomalies_are_spans_of_both_kinds_in_half_of_a_group():
    config = Config(
        channels=6, groups=2, coupling=1.0, test_elements=400, anomalies=10, span=12, shift=3.0, train_elements=4000
    )
    series = make(config)
    kinds, x = series.kinds, series.parts["test"]
    assert [(kinds == kind).sum() for kind in (0, 1, 2)] == [280, 60, 60]
    for number in range(10):  # one span in every tenth
        (where,) = np.nonzero(kinds[40 * number : 40 * number + 40])
        assert where.tolist() == list(range(where[0], where[0] + 12))
        assert set(kinds[40 * number + where]) == {1 + number % 2}
    # With nothing but the signal of the group its channels are equal, but for the one that is not right.
    sizes = []
    for group in range(2):
        own = x[:, series.groups == group]
        away = np.abs(own - np.median(own, axis=1, keepdims=True)).max(1)
        assert away[kinds == 0].max() < 0.01
        sizes.append(away)
    shifted, away = kinds == 1, np.max(sizes, axis=0)
    np.testing.assert_allclose(away[shifted], 3.0, atol=0.01)
    assert away[kinds == 2].min() > 1e-3
    assert np.min(sizes, axis=0).max() < 0.01, "of one group at a time"


def test_windows_and_their_order():
    own = task()
    parts = own.series.parts
    batches = list(own.evaluation_batches("test"))
    assert set(batches[0]) == {"inputs", "targets", "weights", "lengths", "anomalies"}
    assert set(next(iter(own.evaluation_batches("validation")))) == set(batches[0]) - {"anomalies"}
    real = np.concatenate([batch["lengths"] for batch in batches]) == 8
    windows = np.concatenate([batch["inputs"] for batch in batches])[real]
    assert len(windows) == len(np.unique(windows, axis=0)) == 393
    kinds = np.concatenate([batch["anomalies"] for batch in batches])[real]
    ends = {x.tobytes(): end for end, x in enumerate(parts["test"])}
    found = np.array([ends[window[-1].tobytes()] for window in windows])
    assert sorted(found) == list(range(7, 400))
    np.testing.assert_array_equal(windows[:, 0], parts["test"][found - 7])
    np.testing.assert_array_equal(kinds[:, -1], own.series.kinds[found])
    shares = [(batch["anomalies"][:, -1] > 0).mean() for batch in batches[:-1]]
    assert np.std(shares) < 0.2, "a batch is of the whole part"
    np.testing.assert_array_equal(next(iter(task(seed=9).evaluation_batches("test")))["inputs"], batches[0]["inputs"])


def test_a_batch_is_a_function_of_seed_and_step():
    first = task().train_batch(2)
    for name, array in task().train_batch(2).items():
        np.testing.assert_array_equal(array, first[name])
    np.testing.assert_array_equal(first["inputs"], first["targets"])
    assert first["inputs"].shape == (16, 8, 6)
    assert (first["weights"] == 1).all()
    assert np.any(task(seed=4).train_batch(2)["inputs"] != first["inputs"])
    parts = [task(process_index=index, process_count=2).train_batch(2)["inputs"] for index in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), first["inputs"])


SCORE = np.random.default_rng(0).integers(6, size=40).astype(np.float32)  # with ties
OF = np.random.default_rng(1).integers(-1, 2, size=40)  # -1 is neither


def test_pairs_in_order_are_the_area():
    total, pairs = jax.jit(pairs_in_order)(SCORE, OF == 1, OF == 0)
    assert float(total / pairs) == pytest.approx(auc(SCORE[OF >= 0], OF[OF >= 0] > 0), abs=1e-6)
    assert float(pairs) == (OF == 1).sum() * (OF == 0).sum()


@pytest.mark.breadth  # tests/interp/test_circuits.py compares `auc`; the import takes seconds
def test_pairs_in_order_are_the_area_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    total, pairs = pairs_in_order(SCORE, OF == 1, OF == 0)
    assert float(total / pairs) == pytest.approx(metrics.roc_auc_score(OF[OF >= 0], SCORE[OF >= 0]), abs=1e-6)


def test_metrics_are_those_of_the_scores():
    """Of one batch with the whole part, whose last rows are padding; and the baseline of the mean."""
    own = task(batch_size=400)
    (batch,) = own.evaluation_batches("test")
    weights = np.random.default_rng(0).random((6, 6)).astype(np.float32)

    @jax.jit
    def measure(logits, weights, batch):
        output = SimpleNamespace(logits=logits, adjacency=jnp.broadcast_to(weights, (400, 6, 6)))
        loss, _, sums = own.loss(output, batch)
        return loss, sums | own.evaluation_metrics(output, batch)

    loss, sums = measure(np.zeros((400, 8, 6), np.float32), weights, batch)
    found = {name: float(total / weight) for name, (total, weight) in sums.items()}
    assert set(found) == {"loss", "edge_auroc"} | {f"{score}{kind}" for score in SCORES for kind in KINDS}
    windows = batch["inputs"][:393]
    assert found["loss"] == pytest.approx(np.square(windows).mean(), rel=1e-5)
    assert float(loss) == pytest.approx(np.square(windows).mean(-1).sum(), rel=1e-5)
    x, kinds, off = windows[:, -1], batch["anomalies"][:393, -1], ~np.eye(6, dtype=bool)
    others = weights * off / (weights * off).sum(1, keepdims=True)
    for name, score in zip(SCORES, (np.square(x).sum(1), np.square(x - x @ others.T).sum(1)), strict=True):
        for suffix, wanted in zip(KINDS, ((1, 2), (1,), (2,)), strict=True):
            own_rows = np.isin(kinds, (0, *wanted))
            expected = auc(score[own_rows], kinds[own_rows] > 0)
            assert found[f"{name}{suffix}"] == pytest.approx(expected, abs=1e-4)
    assert found["edge_auroc"] == pytest.approx(auc(weights[off], own.coupled[off]), abs=1e-6)
    normal = {name: array for name, array in batch.items() if name != "anomalies"}
    assert set(jax.eval_shape(measure, np.zeros((400, 8, 6), np.float32), weights, normal)[1]) == {"loss", "edge_auroc"}


def test_the_baseline_is_of_means_and_correlations():
    own = task()
    found, x = own.baseline("test"), own.series.parts["test"].astype(float)
    k = np.corrcoef(own.series.parts["train"].T.astype(float))
    distance = np.einsum("tc,cd,td->t", x, np.linalg.inv(k), x)[7:]
    assert found["auroc"] == pytest.approx(auc(distance, own.series.kinds[7:] > 0), abs=1e-6)
    assert found["edge_auroc"] > 0.95
    assert found["loss"] == pytest.approx(np.square(x).mean(), rel=1e-5)
    assert set(own.baseline("validation")) == {"loss", "edge_auroc"}
    with pytest.raises(UserError, match="no evaluation split 'dev'; this task has: validation, test"):
        own.baseline("dev")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 1}, "channels=1: must be at least 2"),
        ({"groups": 5}, "groups=5: must divide the 24 channels"),
        ({"groups": 13}, "groups=13: must be at most 12"),
        ({"length": 0}, "length=0: must be at least 1"),
        ({"train_elements": 32}, "train_elements=32: must be at least 33"),
        ({"coupling": 0.0}, "coupling=0.0: must be above 0 and at most 1"),
        ({"anomalies": 1}, "anomalies=1: must be at least 2"),
        ({"span": 65}, "span=65: must be at most 64"),
        ({"data_seed": -1}, "data_seed=-1: must not be negative"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=rf"^config\.task\.{message}$"):
        to_dataclass(Config, fields, "config.task")


def test_a_model_that_does_not_fit_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^config\.model\.neighbours=10: must be in 1\.\.6, the channels$"):
        build_model({"name": "stackvae"}, SMALL)
    with pytest.raises(UserError, match=r"^config\.model\.channels: not set here, the task decides it$"):
        build_model({"name": "stackvae", "channels": 6}, SMALL)
    with pytest.raises(UserError, match=r"^config\.model\.vae='single': must be one of shared, per_channel, joint$"):
        build_model({"name": "stackvae", "neighbours": 3, "vae": "single"}, SMALL)


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    from configs.synthetic.coupled_series import get_config

    config = get_config("tiny")
    config.task.update(channels=6, groups=2, length=8, train_elements=300, validation_elements=60, test_elements=400)
    config.task.update(anomalies=10, span=12)
    config.model.update(hidden=(4,), latents=2, node_size=3, neighbours=3)
    config.optimizer.warmup_steps = 1
    config.train.update(steps=4, batch_size=16, log_every=2, evaluate_every=2, checkpoint_every=2)
    return config.to_dict()


def test_an_evaluation_has_the_areas_of_a_runs_scores_and_of_its_graph(values, untrained, tmp_path):
    workdir = untrained(values, tmp_path)
    result = evaluate_run(workdir)
    assert {"edge_auroc", "loss", *(f"{score}{kind}" for score in SCORES for kind in KINDS)} <= set(result)
    assert set(result["baseline"]) == {"edge_auroc", "loss", *(f"auroc{kind}" for kind in KINDS)}
    run = load(workdir)
    weights = np.asarray(adjacency(run.variables, run.model.config))
    off = ~np.eye(6, dtype=bool)
    assert result["edge_auroc"] == pytest.approx(auc(weights[off], run.task.coupled[off]), abs=1e-6)


@pytest.mark.breadth  # test_resume.py: resuming; tests/models/test_stackvae.py: terms, and draws are of a key
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(values, tmp_path_factory, tmp_path):
    experiment, workdir = build(values), tmp_path_factory.mktemp("whole")
    train(experiment, workdir)
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained
    assert all(line[f"term/{name}"] > 0 for line in trained for name in ("kl", "graph"))
    run_until_stopped(experiment, tmp_path, "batch", 4)
    train(experiment, tmp_path)
    assert_same_run(tmp_path, workdir, experiment)


def test_a_mesh_that_splits_windows_or_parameters_is_refused(values):
    for mesh in ("sequence", "fsdp", "data=4,fsdp_hidden=2"):
        with pytest.raises(UserError, match=rf"^config\.mesh='{mesh}': a StackVAE reads whole windows by whole param"):
            build({**values, "mesh": mesh})


# A file of the user's.

X = np.random.default_rng(5).normal(3.0, 2.0, size=(200, 3))
LABELS = np.zeros(200, bool)
LABELS[[10, 150, 199]] = True


def own(path: Path, changes: dict[str, Any] | None = None, **arrays: Any) -> series.Task:
    np.savez(path, **arrays)
    config = to_dataclass(series.Config, {"files": (str(path),), "length": 8, **(changes or {})}, "config.task")
    return series.Task(config, batch_size=16, seed=0)


def test_a_file_is_cut_in_order_and_scaled_by_its_training_part(tmp_path):
    task = own(tmp_path / "a.npz", x=X, anomalies=LABELS)
    scaled = (X - X[:120].mean(0)) / X[:120].std(0)
    for split, part in (("train", slice(0, 120)), ("validation", slice(120, 140)), ("test", slice(140, 200))):
        np.testing.assert_allclose(task.series.parts[split], scaled[part], atol=1e-5)
    assert np.flatnonzero(task.series.kinds).tolist() == [10, 59]
    assert task.config.channels == task.resolved["channels"] == 3
    assert "anomalies" in next(iter(task.evaluation_batches("test")))
    assert set(task.baseline("test")) == {"loss", "auroc"}
    (digest,) = task.fingerprint.values()
    assert digest.endswith(hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest())
    unknown = own(tmp_path / "b.npz", x=X.astype(np.float32))
    assert "anomalies" not in next(iter(unknown.evaluation_batches("test")))
    assert set(unknown.baseline("test")) == {"loss"}
    assert unknown.fingerprint != task.fingerprint
    normal = own(tmp_path / "c.npz", x=X, anomalies=np.zeros(200))
    assert set(normal.baseline("test")) == {"loss"}, "nothing to find"


def test_a_model_has_the_channels_of_the_file(tmp_path):
    task = own(tmp_path / "a.npz", x=X)
    model = build_model({"name": "stackvae", "neighbours": 2}, task.config)
    assert (model.config.channels, model.config.length) == (3, 8)


def test_a_seed_of_a_file_is_resumed_and_another_config_is_refused(values, untrained, tmp_path, monkeypatch):
    """The file gives the channels, which the config of the command leaves open."""
    np.savez(tmp_path / "a.npz", x=X)
    task = {"name": "series", "files": (str(tmp_path / "a.npz"),), "fractions": (0.6, 0.1, 0.3), "length": 8}
    values = {**values, "task": {**task, "channels": None}, "model": {**values["model"], "neighbours": 3}}
    workdir = untrained(build(values).values, tmp_path / "seed_0")
    monkeypatch.setattr(seeds, "train_whole", lambda experiment, directory, what: None)
    monkeypatch.setattr(seeds, "evaluate_run", lambda directory, split: {"of": directory})
    assert seeds.run_seed(values, workdir) == {"of": workdir}
    other = {**values, "model": {**values["model"], "neighbours": 2}}
    with pytest.raises(UserError, match=r"was trained with another config \(config\.model\.neighbours: 3 -> 2\)"):
        seeds.run_seed(other, workdir)


@pytest.mark.parametrize(
    ("changes", "arrays", "message"),
    [
        ({}, {"y": X}, r"FILE has no array x \(T, C\)"),
        ({}, {"x": X[:, 0]}, r"x of FILE is float64 \(200,\); it must be numbers \(T, C\), of 2 to 1024 channels"),
        ({}, {"x": X.astype("U8")}, r"x of FILE is <U8 \(200, 3\); it must be numbers"),
        ({}, {"x": X.astype(object)}, r"FILE cannot be read as an npz of arrays \(Object arrays cannot be loaded"),
        ({}, {"x": np.where(X > 6, np.nan, X)}, "x of FILE has numbers that are not finite; fill or leave them out"),
        (
            {},
            {"x": X, "anomalies": LABELS[1:]},
            r"anomalies of FILE must be finite numbers \(200,\), as x has 200 elements",
        ),
        ({"length": 21}, {"x": X}, "the validation part of FILE has 20 elements, windows have config.task.length=21"),
        ({}, {"x": X, "anomalies": LABELS * np.nan}, "anomalies of FILE must be finite numbers"),
        ({}, {"x": X * [1, 0, 1]}, "channel 1 of FILE does not vary in the training part; leave it out"),
        # A constant whose mean is rounded, and numbers that float32 does not have.
        ({}, {"x": X * [1, 0, 1] + [0, 0.1, 0]}, "channel 1 of FILE does not vary in the training part; leave it out"),
        ({}, {"x": X * [1, 1e300, 1]}, "channel 1 of FILE is too large for its deviation in training"),
    ],
)
def test_files_that_cannot_be_read(changes, arrays, message, tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match=f"^config.task.files: {message.replace('FILE', str(path))}"):
        own(path, changes, **arrays)


def test_mistakes_in_a_file_and_its_fields(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^config.task.channels=4: x of .*x.npz has 3; leave channels out$"):
        own(tmp_path / "x.npz", {"channels": 4}, x=X)
    with pytest.raises(UserError, match=r"^config.task.fractions=\(0.5, 0.5, 0.5\): must be three above 0 with sum 1$"):
        own(tmp_path / "x.npz", {"fractions": (0.5, 0.5, 0.5)}, x=X)
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((2**19, 2)))
    monkeypatch.setattr(packed, "MAX_UNCHECKED", 2**20)
    for name, message in (
        ("text.npz", "is not an npz"),
        ("bomb.npz", "it is a decompression bomb"),
        ("none.npz", "there is no regular file"),
    ):
        with pytest.raises(UserError, match=rf"^config.task.files: .*{message}"):
            series.Task(series.Config(files=(str(tmp_path / name),)), batch_size=4, seed=0)
    with pytest.raises(
        UserError, match=r"^config.task.files: name one npz file, as in --config.task.files='\(\"series"
    ):
        series.Task(series.Config(), batch_size=4, seed=0)
