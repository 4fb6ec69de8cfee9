"""Carried state: rows of batches are streams that continue across steps and resumes; a corpus in one pass."""

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_resume import assert_same_run, run_until_stopped

from configs.lm import bytes as recipe
from configs.synthetic import mqar
from experiments.common.errors import UserError
from experiments.evaluation.evaluator import evaluate_run, show
from experiments.evaluation.examples import score
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train
from experiments.training.metrics import METRICS_FILE
from experiments.training.optimizers import make_optimizer
from experiments.training.restore import Run, initial_variables, load
from experiments.training.step import StepFunctions
from seqboat.layers.router import ActivationStats
from seqboat.models.classifier import Output
from seqboat.models.encoder import EncoderConfig
from seqboat.ops.losses import cross_entropy
from tests.helpers import SMALL_MODEL, assert_close, grid

BATCH, LENGTH, CONTEXT = 4, 20, 16
SMALL = {
    "task.length": LENGTH,
    "task.context": CONTEXT,
    **SMALL_MODEL,
    "model.layers": 1,  # a stream is compiled layer by layer; tests/models/test_streaming.py has several
    "train.steps": 0,
    "train.batch_size": BATCH,
}
CARRIED = {"task.carry_state": True, "model.mixer.truncation": None}
SEGMENTS = 7  # the training split's 540 bytes are 4 streams of 135


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """values({"task.carry_state": True}) is a tiny language model of 600 random letters with that difference."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 105, 600).astype(np.uint8).tobytes())

    def make(changes: dict[str, Any] | None = None) -> dict[str, Any]:
        config = recipe.get_config("tiny")
        config.update_from_flattened_dict({**SMALL, "task.files": (str(text),), **(changes or {})})
        return config.to_dict()

    return make


# The step.


@pytest.fixture(scope="module")
def frozen(values, random_state) -> tuple[Experiment, list[Any], list[float]]:
    """A SeqBoat whose parameters never move, computed in two parts: its states before and after every step of an epoch
    and two more, and each step's loss."""
    settings = {"train.accumulate": 2, "optimizer.learning_rate_scales": ((".", 0.0),), "optimizer.clip_norm": 1e9}
    experiment = build(values({**CARRIED, **settings}))
    state = random_state(experiment)
    zeros = jax.tree.map(np.zeros_like, state.metrics)
    update = jax.jit(experiment.functions.train)
    states, losses = [state], []
    for step in range(SEGMENTS + 2):
        state = update(state, experiment.task.train_batch(step), experiment.seed)
        states.append(state)
        losses.append(float(np.divide(*state.metrics["loss"])))
        state = dataclasses.replace(state, metrics=zeros)
    return experiment, states, losses


@pytest.fixture(scope="module")
def parallel(frozen) -> Callable[..., tuple[np.ndarray, Any]]:
    """Of a batch of whole streams, or of their beginnings: the loss of every byte, and the gradient of the mean."""
    experiment, states, _ = frozen

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params, batch):
        out = experiment.model.apply({"params": params}, batch["inputs"], batch["lengths"], True)
        each = cross_entropy(out.logits, batch["targets"])
        return (each * batch["weights"]).sum() / batch["weights"].sum(), each

    def losses_and_gradient(*batches):
        padding = [jax.tree.map(np.zeros_like, batches[0])] * (SEGMENTS - len(batches))
        joined = {
            name: np.concatenate([b[name] for b in (*batches, *padding)], 1)
            for name in ("inputs", "targets", "weights")
        }
        gradient, each = run(states[0].params, joined | {"lengths": sum(b["lengths"] for b in batches)})
        return np.asarray(each, np.float64), gradient

    return losses_and_gradient


def test_the_loss_of_every_step_is_that_of_the_whole_streams_and_then_they_begin_again(frozen, parallel):
    experiment, _, losses = frozen
    batches = [experiment.task.train_batch(step) for step in range(SEGMENTS)]
    each, _ = parallel(*batches)
    weights = np.concatenate([batch["weights"] for batch in batches], 1)
    share = lambda a: (a * weights).reshape(BATCH, SEGMENTS, LENGTH).sum((0, 2))
    expected = share(each) / share(np.ones_like(each))
    np.testing.assert_allclose(losses[:SEGMENTS], expected, rtol=1e-5)
    np.testing.assert_allclose(losses[SEGMENTS:], expected[:2], rtol=1e-5)
    alone, _ = parallel(batches[1])
    assert abs(float(alone[:, :LENGTH].mean()) - expected[1]) > 1e-4, "what came before matters"


def test_the_first_gradient_is_the_parallel_one(frozen, parallel):
    """Read from the optimiser's first moment: Adam would hide its scale. The second is not: there is a state."""
    experiment, states, _ = frozen

    def distance(step):
        b1 = experiment.config.optimizer.b1
        found = jax.tree.map(
            lambda new, old: (new - b1 * old) / (1 - b1),
            *jax.device_get((states[step + 1].opt_state.first, states[step].opt_state.first)),
        )
        _, expected = parallel(experiment.task.train_batch(step))
        squares = lambda tree: sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(tree))
        return math.sqrt(squares(jax.tree.map(np.subtract, found, jax.device_get(expected))) / squares(expected))

    assert distance(0) < 1e-5
    assert distance(1) > 1e-3


def test_streams_that_begin_are_empty_and_the_others_are_not(frozen):
    """After step 7, which begins the second epoch, the state is that after step 0."""
    _, states, _ = frozen
    rms = lambda tree: math.sqrt(sum(float(np.square(np.abs(leaf)).sum()) for leaf in jax.tree.leaves(tree.ssm)))
    assert rms(states[0].streams[0]) == 0
    assert rms(states[1].streams[0]) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        states[SEGMENTS + 1].streams,
        states[1].streams,
    )
    assert states[SEGMENTS].streams[0].memories[0].now.tolist() == [135] * BATCH
    assert states[SEGMENTS + 2].streams[0].memories[0].now.tolist() == [2 * LENGTH] * BATCH


# The loop, with a model that compiles in no time: the logits are the sum of all rows of a table so far.


class Sum(NamedTuple):
    total: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class LightConfig:
    encoder: EncoderConfig
    vocabulary_size: int


class Table(nn.Module):
    """Named as the table of an embedding, for which there is a rule on a mesh."""

    size: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("table", nn.initializers.normal(0.1), (self.size, self.size))


class Light(nn.Module):
    config: LightConfig

    @nn.nowrap
    def initial_state(self, batch: int) -> tuple[Sum]:
        return (Sum(jnp.zeros((batch, self.config.vocabulary_size)), jnp.zeros(batch, jnp.int32)),)

    def __call__(self, inputs, lengths, train=False) -> Output:
        return self.stream(inputs, lengths, self.initial_state(len(inputs)), train)[0]

    @nn.compact
    def stream(self, inputs, lengths, state, train=False) -> tuple[Output, tuple[Sum]]:
        size, (before,) = self.config.vocabulary_size, jax.lax.stop_gradient(state)
        table = Table(size, name="embedding")()
        valid = jnp.arange(inputs.shape[1])[None] < lengths[:, None]
        total = before.total[:, None] + jnp.cumsum(jnp.where(valid[..., None], table[inputs], 0), axis=1)
        none = jnp.zeros((self.config.encoder.layers, 0))
        elements = jnp.full(self.config.encoder.layers, lengths.sum().astype(jnp.float32))
        after = Sum(total[:, -1], before.count + lengths)
        return Output(total, ActivationStats(none, none, none, elements, none, none)), (after,)


def on_light(built: Experiment, streams: int = BATCH) -> Experiment:
    """The experiment with that model in place of a SeqBoat."""
    config, task = built.config, built.task
    model = Light(LightConfig(built.model.config.encoder, task.config.vocabulary_size))
    functions = StepFunctions(
        model,
        task.loss,
        lambda params: make_optimizer(config.optimizer, config.train.steps, params),
        task.train_batch(0),
        accumulate=config.train.accumulate,
        num_streams=streams,
    )
    return dataclasses.replace(built, model=model, functions=functions)


@pytest.fixture(scope="module")
def light(values, remembering) -> Experiment:
    plan = {"train.steps": 10, "train.log_every": 3, "train.evaluate_every": 4, "train.checkpoint_every": 2}
    built = build(values({**CARRIED, **plan, "train.accumulate": 2, "optimizer.warmup_steps": 2}))
    return remembering(on_light(built))


@pytest.fixture(scope="module")
def unbroken(light, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    train(light, workdir)
    return workdir


PLACES = [("batch", 2), ("batch", 5), ("evaluation", 8), ("save", 6), ("batch", 10)]


@pytest.mark.parametrize(("place", "step"), grid(PLACES, ("batch", 5)))
def test_a_resumed_run_is_the_unbroken_one(light, unbroken, tmp_path, place, step):
    """Its streams too; step 8 begins the second epoch."""
    run_until_stopped(light, tmp_path, place, step)
    train(light, tmp_path)
    assert_same_run(tmp_path, unbroken, light)


@pytest.mark.breadth  # test_resume.py: the same comparison
def test_the_comparison_can_fail(light, unbroken, tmp_path):
    """A run that resumes with empty streams is told apart."""
    run_until_stopped(light, tmp_path, "batch", 5)
    with pytest.MonkeyPatch.context() as patch:
        batch = type(light.task).train_row
        patch.setattr(type(light.task), "train_row", lambda task, row: batch(task, row) | {"begins": np.bool_(True)})
        train(dataclasses.replace(light, task=build(light.values).task), tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, unbroken, light)


def test_validation_is_one_pass_in_as_many_streams(light, unbroken):
    lines = [json.loads(line) for line in (unbroken / METRICS_FILE).read_text().splitlines()]
    (found,) = [line["bits_per_byte"] for line in lines if line["kind"] == "evaluation" and line["step"] == 10]
    table = load_params(light, unbroken)["embedding"]["table"].astype(np.float64)
    data, total = light.task.bytes["validation"].astype(int) + 1, 0.0
    for row in range(BATCH):
        first, end = len(data) * row // BATCH, len(data) * (row + 1) // BATCH
        before = min(first, CONTEXT)
        ids = np.concatenate([[0], data[first - before : end]])
        logits = np.cumsum(table[ids[:-1]], 0)
        scores = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), ids[1:]]
        total += scores[before:].sum()
    assert found == pytest.approx(total / len(data) / math.log(2), rel=1e-5)


def load_params(experiment: Experiment, workdir: Path) -> dict[str, np.ndarray]:
    abstract = jax.eval_shape(lambda: experiment.functions.init(0))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore(10, abstract).state.params)


@pytest.mark.slow
def test_a_seqboat_resumes_bit_for_bit(values, tmp_path):
    """With dropout, a router that is paid, and accumulated parts."""
    plan = {"train.steps": 9, "train.log_every": 3, "train.evaluate_every": 4, "train.checkpoint_every": 2}
    router = {"router.centered": True, "router.straight_through": True, "router.key_credit": True}
    moving = {"dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1, **router}
    plan |= {"model.layers": 2, "train.accumulate": 2}
    changes = {**CARRIED, **plan, **{f"model.{name}": value for name, value in moving.items()}}
    experiment = build(values(changes))
    train(experiment, tmp_path / "unbroken")
    run_until_stopped(experiment, tmp_path / "broken", "batch", 6)
    train(experiment, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", experiment)


# Several devices.


ON_DEVICES = {
    **CARRIED,
    "model.layers": 2,
    "train.steps": 9,
    "train.log_every": 1,
    "train.evaluate_every": 4,
    "train.checkpoint_every": 4,
    "optimizer.warmup_steps": 2,
}


MODELS = {"light": on_light, "seqboat": lambda built: built}


@pytest.fixture(scope="module", params=grid(tuple(MODELS), "light"))
def make(request) -> Callable[[Experiment], Experiment]:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def one_device(values, remembering, make) -> Experiment:
    return remembering(make(build(values(ON_DEVICES))))


@pytest.fixture(scope="module")
def on_one(one_device, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("one")
    train(one_device, workdir)
    return workdir


def assert_same_streams(workdir: Path, on_one: Path, one_device: Experiment) -> None:
    """Losses, validation and the state after."""
    (step, state, found), (expected_step, expected, records) = (whole(path, one_device) for path in (workdir, on_one))
    assert step == expected_step == 9
    assert [(line["step"], line["kind"]) for line in found] == [(line["step"], line["kind"]) for line in records]
    assert_close([line["loss"] for line in found], [line["loss"] for line in records])
    assert_close((state.params, state.streams), (expected.params, expected.streams), floor=1e-2)


def rows_of_a_device(experiment: Experiment) -> set[int]:
    abstract = experiment.partition.abstract(experiment.functions.init, experiment.seed)
    return {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(abstract.streams)}


@pytest.mark.breadth  # tests/parallel/test_steps.py: meshes
def test_streams_split_over_a_mesh_are_those_of_one_device(values, make, one_device, on_one, tmp_path):
    """The first steps and the last on one device, those between on a mesh, of which every device holds its rows."""
    mesh = "data=4,fsdp_hidden=2" if make is on_light else "data=2,fsdp=2,fsdp_hidden=2"
    split = make(build(values({**ON_DEVICES, "mesh": mesh})))
    assert rows_of_a_device(split) == {1}
    workdir = Path(shutil.copytree(on_one, tmp_path / "run"))
    for step in (8, 9):
        shutil.rmtree(workdir / f"checkpoints/{step}")
    run_until_stopped(split, workdir, "batch", 9)
    train(one_device, workdir)
    assert_same_streams(workdir, on_one, one_device)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,fsdp_hidden=2", "data=4,fsdp_hidden=2"])
def test_streams_begun_on_a_mesh_are_those_of_one_device(values, make, one_device, on_one, tmp_path, mesh):
    """The state is made there; the last steps are on one device."""
    if make is on_light:
        pytest.skip("its table has no dimension that every mesh splits")
    split = make(build(values({**ON_DEVICES, "mesh": mesh})))
    assert rows_of_a_device(split) == {1}
    run_until_stopped(split, tmp_path, "batch", 6)
    train(one_device, tmp_path)
    assert_same_streams(tmp_path, on_one, one_device)


def whole(workdir: Path, experiment: Experiment) -> tuple[int, Any, list[dict[str, Any]]]:
    """The last step, its state, and the metrics."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(checkpoints.steps()[-1], jax.eval_shape(lambda: experiment.functions.init(0)))
    return (
        restored.step,
        restored.state,
        [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()],
    )


# One pass.


@pytest.fixture(scope="module")
def plain(untrained, values, tmp_path_factory) -> Path:
    """A run without streams."""
    return untrained(values({"model.mixer.truncation": None}), tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(scope="module")
def logits(plain) -> Callable[[np.ndarray], jax.Array]:
    """The parallel form's logits of a text of up to 40 symbols."""
    run = load(plain)
    apply = jax.jit(run.model.apply)

    def parallel(ids: np.ndarray) -> jax.Array:
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(ids)] = ids
        return apply(run.variables, padded, np.array([len(ids)], np.int32)).logits[:, : len(ids)]

    return parallel


@pytest.fixture(scope="module")
def losses(logits) -> Callable[[np.ndarray], np.ndarray]:
    """The parallel form's cross-entropy of every byte of a text, in nats."""

    def each(data: np.ndarray) -> np.ndarray:
        ids = data.astype(np.int32) + 1
        found = np.asarray(logits(np.concatenate([[0], ids[:-1]]))[0], np.float64)
        return np.log(np.exp(found).sum(1)) - found[np.arange(len(ids)), ids]

    return each


@pytest.mark.parametrize(("count", "compared"), grid([(1, False), (3, False), (1, True)], (3, False)))
def test_one_pass_is_the_likelihood_of_the_whole_text(plain, losses, count, compared, capsys):
    """Of several streams: of each part after the `context` bytes before it. And it can be compared with another."""
    result = evaluate_run(plain, streams=count, against=plain if compared else None)
    data, total = load(plain).task.bytes["test"], 0.0
    assert len(data) == 30
    for row in range(count):
        first, end = len(data) * row // count, len(data) * (row + 1) // count
        before = min(first, CONTEXT)
        total += losses(data[first - before : end])[before:].sum()
    assert result["bits_per_byte"] == pytest.approx(total / len(data) / math.log(2), rel=1e-5)
    assert (result["protocol"], result["streams"]) == ("one pass with carried state", count)
    assert "data_changed" not in result
    assert "warning" not in capsys.readouterr().err
    file = plain / f"one_pass_{count}_test_0.json"
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    if compared:
        assert result["against"]["metrics"]["bits_per_byte"]["p_value"] == 1


@pytest.mark.breadth  # test_restore.py: loading; test_streaming.py: streams
def test_the_lines_of_the_documentation(plain, logits):
    """As written there, except for the work directory: the pieces give the results of the full text."""
    text = (Path(__file__).parents[2] / "docs/streaming.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(block.replace("runs/x", str(plain)), names)
    whole = logits(np.frombuffer(b"An endless text, in pieces of any length", np.uint8).astype(np.int32) + 1)
    assert_close(names["output"].logits, whole[:, -names["lengths"][0] :])


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.mixer": {"name": "s4d", "truncation": 5}},
            "config.task.carry_state=True: config.model.mixer.truncation=5 cannot be streamed: only the EMA has a "
            "state for a truncated kernel; train with None",
        ),
        ({"model.window_size": None}, "config.task.carry_state=True: config.model.window_size=None cannot be streamed"),
        (
            {"mesh": "data=4,sequence=2"},
            "config.task.carry_state=True: a mesh may split the streams, not their pieces, and not by pmap; "
            "config.mesh='data=4,sequence=2' is none of data, fsdp, fsdp_hidden and mixtures",
        ),
        (
            {"mesh": "pmap"},
            "config.task.carry_state=True: a mesh may split the streams, not their pieces, and not by pmap",
        ),
        ({"mesh": "data"}, "config.mesh='data': 8 devices cannot share batches of 4 examples"),
        ({"train.batch_size": 31}, "config.task.carry_state=True: the validation split has 30 bytes for 31 streams"),
    ],
    ids=["cut kernel", "no window", "pieces", "pmap", "devices", "too many streams"],
)
def test_what_cannot_carry_a_state_is_refused_before_compiling(values, changes, message):
    with pytest.raises(UserError, match="^" + message.replace("(", r"\(")):
        build(values({**CARRIED, **changes}))


def test_other_tasks_have_no_streams(tiny):
    values = tiny()
    values["task"]["carry_state"] = True
    with pytest.raises(UserError, match=r"config.task.carry_state: unknown field"):
        build(values)


@pytest.mark.breadth  # test_the_loss_of_every_step_is_that_of_the_whole_streams_and_then_they_begin_again
def test_a_checkpoint_without_streams_is_refused_and_its_parameters_can_be_taken(values, untrained, tmp_path):
    plain = untrained(values({"model.mixer.truncation": None}), tmp_path / "run", whole=True)
    carried = build(values(CARRIED))
    with pytest.raises(UserError, match=r"different config.task.carry_state or batch_size: .* by --init_from"):
        train(carried, plain)
    taken = initial_variables(carried, plain)
    jax.tree.map(np.testing.assert_array_equal, taken["params"], load(plain).variables["params"])


def test_a_piece_of_another_length_is_not_resumed(values, light, unbroken):
    other = dataclasses.replace(light, values={**light.values, "task": {**light.values["task"], "length": LENGTH + 1}})
    with pytest.raises(UserError, match=r"^config.task.length: 20 -> 21: this changes where each stream starts"):
        train(other, unbroken)


def test_what_has_no_streams_is_not_evaluated_in_one_pass(values, tiny):
    other = mqar.get_config()
    for config, message in (
        (
            tiny(),
            "short_listops with a Classifier has no streams: one-pass evaluation is for language models of a corpus",
        ),
        (
            other.to_dict(),
            "mqar with a LanguageModel has no streams: one-pass evaluation is for language models of a corpus",
        ),
        (values({"model.window_size": None}), "this model cannot be evaluated in one pass: window_size=None cannot be"),
    ):
        with pytest.raises(UserError, match="^" + message):
            score(Run(config, build(config).model, {}, 0), "test", streams=1)


def test_more_streams_than_bytes_are_refused(values):
    config = values({"model.mixer.truncation": None})
    run = Run(config, build(config).model, {}, 0)
    with pytest.raises(UserError, match=r"^--streams=31: the test split has 30 bytes; choose 1\.\.30$"):
        score(run, "test", streams=31)


# Other data.


@pytest.fixture
def another_text(tmp_path) -> Path:
    """A shorter text under the name of the one that was trained on."""
    path = tmp_path / "elsewhere" / "text.txt"
    path.parent.mkdir()
    path.write_bytes(b"abcdefgh" * 70)
    return path


CHANGED = r"config\.task\.files\[0\]: 600 bytes, sha256 [0-9a-f]{12} -> 560 bytes, sha256 [0-9a-f]{12}"


@pytest.mark.breadth  # test_resuming_on_other_data_says_so
def test_an_evaluation_of_other_data_says_so(plain, another_text, capsys):
    result = evaluate_run(plain, data_dir=str(another_text.parent))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"warning: {re.escape(str(plain))} was trained on different data: {CHANGED}", line)
    assert re.fullmatch(CHANGED, *result["data_changed"])
    show(result)


def test_resuming_on_other_data_says_so(values, another_text, tmp_path, capsys):
    first = on_light(build(values()), streams=0)
    train(first, tmp_path / "run")
    train(dataclasses.replace(first, task=build(values({"task.files": (str(another_text),)})).task), tmp_path / "run")
    assert re.search(f"changed since that checkpoint: the data, {CHANGED}\n", capsys.readouterr().out)


def test_streams_of_another_text_are_not_resumed(values, light, unbroken, another_text):
    task = build(values({**CARRIED, "task.files": (str(another_text),)})).task
    with pytest.raises(UserError, match=f"^{CHANGED}: the saved stream state belongs to a different text"):
        train(dataclasses.replace(light, task=task), unbroken)
