"""Training steps on meshes of eight devices equal those on one: losses, parameters, statistics, metrics."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, vanishing

from configs import base, quickstart
from configs.lra import retrieval as lra_retrieval
from configs.synthetic import codes, coupled_series, gliding_digits, selective_copy
from experiments.common.errors import UserError
from experiments.data.sources import Generated
from experiments.tasks import retrieval
from experiments.training.experiment import build
from experiments.training.objectives import attach
from experiments.training.step import means
from seqboat.models import stackvae

STEPS = 5
SMALL = {
    "model.layers": 2,
    "model.features": 8,
    "model.key_size": 8,
    "model.value_size": 16,
    "model.mixer.state_size": 2,
    "model.window_size": 4,
    "model.block_size": 16,
    "train.batch_size": 8,
    "train.steps": STEPS,
    "train.activation_penalty": 0.1,
}
LANGUAGE = {**SMALL, "task.train_examples": 64, "task.test_examples": 16}
# Batch norm, both directions, a centred router, a sinusoid: everything that looks over the batch or the length.
CLASSIFIER = LANGUAGE | {
    "task.validation_examples": 16,
    "model.norm": "batch",
    "model.sinusoid": True,
    "model.router.centered": True,
    "model.router.initial_bias": 0.02,
}
PAIRS = SMALL | {
    "task.length": 16,
    "model.mixer.truncation": None,
    "model.dropout": 0.0,
    "train.accumulate": 1,
    "model.router.initial_bias": 0.05,
    "optimizer.warmup_steps": 2,
}
RATE = {"train.activation_penalty": 0.0, "model.router.target_rate": 0.3, "model.router.rate_control": "exact"}
# Whole transformer blocks around the elements that the router ranks first, and the term of the loss about them.
NOT_OF_BLOCKS = ("model.key_size", "model.value_size", "model.mixer.state_size", "model.window_size")
BLOCKS = {name: value for name, value in LANGUAGE.items() if name not in NOT_OF_BLOCKS}
BLOCKS |= {"model.heads": 2, "model.router.capacity": 0.3, "model.router.capacity_loss": 0.5}
TRANSFORMER = SimpleNamespace(get_config=lambda: selective_copy.get_config("transformer,mod"))
# Models without attention, which compile sooner: every model with its own parts of a step.
SIZES = {name: value for name, value in SMALL.items() if name not in ("model.block_size", "train.activation_penalty")}
NO_ATTENTION = SIZES | {
    "model.layers": 1,
    "model.activation": "never",
    "task.train_examples": 64,
    "task.test_examples": 16,
}
FRAMES = NO_ATTENTION | {"model.filters": (4, 8), "model.mixer.truncation": None}
SLOW = {name: value for name, value in NO_ATTENTION.items() if name != "model.mixer.state_size"}
SLOW |= {"model.layers": 2, "model.mixer.kernel_size": 32, "model.mixer.frequency": 1.0}
CODES = NO_ATTENTION | {"task.length": 8, "task.coarse": 4, "task.fine": 4}
SERIES = {"task.channels": 6, "task.groups": 2, "task.length": 8, "task.anomalies": 10, "task.span": 12}
SERIES |= {f"task.{split}_elements": 400 for split in ("train", "validation", "test")}
SERIES |= {"model.hidden": (8,), "model.latents": 2, "model.neighbours": 3, "optimizer.warmup_steps": 1}
SERIES |= {name: value for name, value in SMALL.items() if name in ("train.batch_size", "train.steps")}


def _slow():
    config = selective_copy.get_config("no_attention,hyperzzw")
    config.objectives = base.objective("slow")
    return config


CONFIGS = {
    "slow": (SimpleNamespace(get_config=_slow), SLOW),
    "frames": (gliding_digits, FRAMES),
    "codes": (codes, CODES),
    "series": (coupled_series, SERIES),
    "classifier": (quickstart, CLASSIFIER),
    "language model": (selective_copy, {**LANGUAGE, **RATE}),
    "pairs": (lra_retrieval, PAIRS),
    "transformer": (TRANSFORMER, BLOCKS),
}


@pytest.fixture(autouse=True)
def _pairs_in_memory(monkeypatch):
    documents = lambda draw: {f"text{i}": draw.bytes(draw.integers(1, 20)) for i in (1, 2)}
    example = lambda draw: {**documents(draw), "label": int(draw.integers(2))}
    monkeypatch.setattr(retrieval, "open_split", lambda *_: Generated(example, seed=0, split=0, size=32))


def values(name, **changes):
    config_file, fixed = CONFIGS[name]
    config = config_file.get_config()
    config.update_from_flattened_dict({**fixed, **changes})
    return config.to_dict()


def run(name, mesh, start=None, **changes):
    """((losses, parameters, statistics, the optimiser's state) after STEPS steps, metrics, an evaluation).

    `start` holds the first state, or is empty and takes it, for another run that then compiles no initialiser."""
    experiment = attach(build(values(name, **{"mesh": mesh, **changes})), Path("nowhere"))
    partition, task = experiment.partition, experiment.task
    if start:
        state = jax.tree.map(jnp.asarray, start[0])
    else:
        state = partition.create(experiment.functions.init, experiment.seed)
    if start is not None:
        start[:] = [jax.device_get(state)]
    update = partition.compile(experiment.functions.train, state, partition.put(task.train_batch(0)), experiment.seed)
    losses = []
    for step in range(STEPS):
        before = means(state.metrics)["loss"] if step else None
        state = update(state, partition.put(task.train_batch(step)), experiment.seed)
        losses.append(jax.device_get(state.metrics["loss"]))
        assert before is None or np.isfinite(before)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    batch = partition.put(next(iter(task.evaluation_batches("validation"))))
    sums = partition.evaluate(experiment.functions.evaluate)(variables, batch)
    # A class without examples has no mean: counts instead.
    evaluation = means(sums) | {name: np.asarray(pair[0]) for name, pair in sums.items() if name == "confusion"}
    return jax.device_get((losses, state.params, state.batch_stats, state.opt_state)), means(state.metrics), evaluation


@functools.cache
def alone(name):
    return run(name, None)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("classifier", "fsdp=2,fsdp_hidden=2,sequence=2", marks=pytest.mark.breadth),
        pytest.param("classifier", "pmap", marks=pytest.mark.breadth),
        pytest.param("language model", "data=2,sequence=4", marks=pytest.mark.breadth),
        pytest.param("transformer", "data=2,fsdp=2,fsdp_hidden=2", marks=pytest.mark.breadth),
        *(
            pytest.param(name, mesh, marks=pytest.mark.slow)
            for name in ("classifier", "language model", "pairs")
            for mesh in ("ddp", "fsdp", "fsdp_hidden", "sequence", "fsdp=4,sequence=2")
        ),
    ],
)
def test_eight_devices_train_as_one(name, mesh):
    got, expected = run(name, mesh), alone(name)
    assert 0.05 < expected[1]["activation_rate"][0] < 1
    assert_close(got[0], expected[0], floor=vanishing(expected[0]))
    assert_close(got[1:], expected[1:])


@pytest.mark.parametrize("mesh", grid(("fsdp=2,fsdp_hidden=2,sequence=2", "pmap"), "fsdp=2,fsdp_hidden=2,sequence=2"))
def test_a_model_without_attention_trains_as_on_one_device(mesh):
    """It compiles in seconds; averages look over the length, and batch norm over the batch. test_rules.py compiles a
    step with attention, test_sequence.py exchanges its rows. Both begin from the state made on the mesh; that of one
    device is the same in test_models_with_parts_of_their_own_train_as_on_one_device."""
    changes, start = {"model.activation": "never", "train.activation_penalty": 0.0}, []
    got, expected = (run("classifier", where, start, **changes) for where in (mesh, None))
    assert_close(got[0], expected[0], floor=vanishing(expected[0]))
    assert_close(got[1:], expected[1:])


# test_a_model_without_attention_trains_as_on_one_device; tests/experiments/test_series.py: refused meshes.
@pytest.mark.breadth
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("frames", "fsdp=2,fsdp_hidden=2,sequence=2"),
        ("codes", "data=2,fsdp=2,fsdp_hidden=2"),
        ("series", "data"),
        ("slow", "data=2,fsdp=2,fsdp_hidden=2"),
    ],
)
def test_models_with_parts_of_their_own_train_as_on_one_device(name, mesh, monkeypatch):
    """The convolutions of frames, both stages of tokens, the terms of a series, whose draws depend on the mesh, and the
    kernels that the objective `slow` compares."""
    if name == "frames":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.setattr(stackvae.jax.random, "normal", lambda key, shape: 0.5 + jnp.zeros(shape))
    got, expected = run(name, mesh), run(name, None)
    assert_close(got[0], expected[0], floor=vanishing(expected[0]))
    assert_close(got[1:], expected[1:])


OTHERS = [
    ("pairs", "fsdp", {}),
    ("pairs", "data=2,sequence=4", {}),
    ("language model", "pmap", {"train.accumulate": 2, "train.batch_size": 16}),
    (
        "language model",
        "data=2,sequence=4",
        {"model.position": "t5", "model.attention_function": "relu2", "model.blocks_per_iteration": 4},
    ),
    (
        "language model",
        "data=2,sequence=4",
        {"model.position": "rotary", "model.activation": "always", "model.norm": "scale"},
    ),
    ("language model", "data=2,sequence=4", {"model.activation": "never"}),
    (
        "classifier",
        "data=2,sequence=4",
        {"model.position": "t5", "model.attention_function": "relu2", "model.blocks_per_iteration": 3},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "changes"), OTHERS)
def test_other_layers_train_as_on_one_device(name, mesh, changes):
    got, expected = run(name, mesh, **changes), run(name, None, **changes)
    assert_close(got[0], expected[0], floor=vanishing(expected[0]))
    assert_close(got[1], expected[1])


@pytest.mark.slow
def test_transformers_with_a_window_train_on_split_sequences():
    changes = {"model.window_size": 4, "model.router.rule": "margin", "model.router.capacity": 0.125}
    changes["model.router.capacity_loss"] = 0.01
    got, expected = run("transformer", "data=2,sequence=4", **changes), run("transformer", None, **changes)
    assert_close(got[0], expected[0], floor=vanishing(expected[0]))
    assert_close(got[1:], expected[1:])


@pytest.mark.slow
def test_mega_trains_as_on_one_device(monkeypatch):
    def mega():
        config = quickstart.get_config()
        config.model = base.block(config.model, "mega")
        return config

    own = mega().model
    sizes = {name: value for name, value in LANGUAGE.items() if not name.startswith("model.") or name[6:] in own}
    changes = {"train.activation_penalty": 0.0, "task.validation_examples": 16, "model.mixer.state_size": 2}
    changes |= {"model.chunk": 8, "model.feed_forward_size": 8, "model.position": "rotary"}
    monkeypatch.setitem(CONFIGS, "mega", (SimpleNamespace(get_config=mega), {**sizes, **changes}))
    got, expected = run("mega", "data=2,fsdp=2,fsdp_hidden=2"), run("mega", None)
    assert_close(got[0], expected[0], floor=vanishing(expected[0]))
    assert_close(got[1:], expected[1:])
    with pytest.raises(UserError, match=r"config.model.chunk=8: chunks are not split over devices"):
        run("mega", "data=2,sequence=4")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["sequence", "data"])
def test_credit_on_a_mesh_pays_as_on_one_device(mesh):
    """Credit has no value, only a gradient for the router: it shows in the optimiser's first moment."""
    changes = {f"model.router.{name}": True for name in ("key_credit", "straight_through", "eviction_cost")}
    got, expected = run("language model", mesh, **changes), run("language model", None, **changes)
    assert_close(got[0], expected[0], floor=vanishing(expected[0]))


@pytest.mark.slow
def test_a_batch_in_parts_on_a_mesh():
    got, expected = run("language model", "data=4,sequence=2", **{"train.accumulate": 2}), alone("language model")
    assert_close(got[0][0], expected[0][0])


CAPACITY = {"model.router.rule": "capacity"}
MISTAKES = {
    "rows": ("there is no mesh axis 'rows'; there are data, fsdp, fsdp_hidden, sequence", {}),
    "data=3": ("'data=3' needs 3 devices, there are 8", {}),
    "data,data=2": ("mesh axis 'data' is named twice", {}),
    "data,fsdp": ("data and fsdp have no size: only one axis can take the remaining devices", {}),
    "data=0,fsdp": ("mesh axis data=0: its size must be a whole number of devices", {}),
    "data": ("8 devices cannot share batches of 6 examples", {"train.batch_size": 6}),
    "fsdp": (
        "embedding/table (17, 12), dimension 1 (embed): 12 does not divide evenly among fsdp = 8",
        {"model.features": 12},
    ),
    "sequence": (
        "config.model.window_size=None: must be finite if config.mesh splits sequences",
        {"model.window_size": None},
    ),
    "sequence=8": (
        "config.model.mixer.truncation=8: must be None if config.mesh splits sequences",
        {"model.mixer.truncation": 8},
    ),
    "data=2,sequence=4": ("config.model.router.rule='capacity': must be 'margin' if config.mesh splits", CAPACITY),
    "sequence=4,data=2": ("4 devices cannot share sequences of 41 elements", {"task.length": 33}),
}


@pytest.mark.parametrize("mesh", MISTAKES)
def test_what_cannot_be_split_is_said_before_anything_is_compiled(mesh):
    message, changes = MISTAKES[mesh]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build(values("language model" if "task.length" in changes else "classifier", mesh=mesh, **changes))
    assert "\n" not in str(caught.value)
