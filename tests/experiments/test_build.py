"""Every config builds, its resolved values are known, and none of its knobs does nothing.

Where a config was changed on purpose, `python -m tests.experiments.test_build` writes tests/golden/config_*.txt anew.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import base
from experiments.common.config import differences, to_dataclass
from experiments.common.errors import UserError
from experiments.tasks import activations, series
from experiments.training.experiment import Config, Experiment, TrainConfig, build
from experiments.training.models import build_model
from experiments.training.optimizers import make_optimizer
from seqboat.layers import transformer
from seqboat.layers.mixers import ema, s4d
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.autoencoder import Autoencoder
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.context_autoencoder import ContextAutoencoder
from seqboat.models.dictionary import Dictionary
from seqboat.models.encoder import EncoderConfig
from seqboat.models.frames import Frames
from seqboat.models.language_model import LanguageModel
from seqboat.models.mlp import MLP
from seqboat.models.retrieval import DualEncoder
from seqboat.models.stackvae import StackVAE
from tests.helpers import grid

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests/golden"
VARIANTS = ("paper", "credit_router", "tiny", "full", "always", "random", "no_attention", "s4d", "tiny,no_attention")
PRETRAINING = ("mae", "probe", "fine_tune", "probe,tiny", "transformer")
NO_LAYERS = ("configs/series", "configs/synthetic/coupled_series")  # with a variant :tiny, and none of those of layers
HYPER_VARIANTS = ("mip", "default", "encoding", "residual", "hyperfan", "encoding_hyperfan", "zero_head")
SHARED = {"base.py", "variants.py", "arms.py", "stages.py", "__init__.py"}
RECIPES = sorted(
    path.relative_to(REPOSITORY).with_suffix("").as_posix()
    for path in (REPOSITORY / "configs").rglob("*.py")
    if path.name not in SHARED and path.parent.name != "sweeps"  # tables: tests/experiments/test_sweep.py
)


@pytest.fixture(scope="session")
def packed(tiny):
    """`tiny` in the packed form, which has the most knobs. Not of its name: fixtures of the session would keep it."""
    return lambda changes=None: tiny({"model.form": "packed", **(changes or {})})


def get_config(recipe: str):
    return importlib.import_module(recipe.replace("/", ".")).get_config


def variants(recipe: str) -> dict[str, ConfigDict]:
    """The resolved configs of a recipe by variant; "" is the one of no argument."""
    make = get_config(recipe)
    names = VARIANTS if inspect.signature(make).parameters else ()
    if recipe in NO_LAYERS:
        names = ("tiny",)
    if recipe.startswith("configs/pretrain"):
        names = PRETRAINING
    if recipe.startswith("configs/hyper"):
        names = (*HYPER_VARIANTS, "separate" if "pareto" in recipe else "mip,sgd")
    return {"": make()} | {name: make(name) for name in names}


def model_of(config: ConfigDict) -> nn.Module:
    """The model, with the sizes of its task and none of its data."""
    fields = config.task.to_dict()
    module = importlib.import_module(f"experiments.tasks.{fields.pop('name')}")
    if module is activations:
        fields |= {"width": 64, "target_width": 64 if fields["target_site"] else None}  # of the run that it reads
    if module is series:
        fields["channels"] = 24  # of the file that it reads
    return build_model(config.model.to_dict(), to_dataclass(module.Config, fields, "config.task"))


@functools.cache
def parameters(model: nn.Module, channels: int = 1) -> Any:
    """Shapes; many variants have one model."""
    if isinstance(model, DualEncoder):
        inputs, lengths = jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)
    elif isinstance(model, ContextAutoencoder):
        symbols = model.config.vocabulary_size is not None
        inputs = jnp.zeros((1, 1, 2), jnp.int32) if symbols else jnp.zeros((1, 1, model.config.channels or 0))
        lengths = jnp.ones(1, jnp.int32)
    elif isinstance(model, Frames):
        inputs, lengths = jnp.zeros((1, 1, model.config.channels)), jnp.ones(1, jnp.int32)
    elif isinstance(model, MLP | Dictionary | Autoencoder | StackVAE):
        inputs, lengths = jnp.zeros((1, 1, getattr(model.config, "width", 64))), jnp.ones(1, jnp.int32)
    elif model.config.vocabulary_size is None:
        inputs, lengths = jnp.zeros((1, 1, channels)), jnp.ones(1, jnp.int32)
    else:
        inputs, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), inputs, lengths)["params"]


def describe(recipe: str, counted: bool = True) -> str:
    """Every leaf of the recipe and, if `counted`, its number of parameters; of every variant what differs."""
    first, *others = variants(recipe).items()
    number = lambda config: f"{count(config):,}" if counted else "?"
    lines = [f"{recipe}.py: {number(first[1])} parameters", *leaves(first[1].to_dict(), "config")]
    for name, config in others:
        lines += ["", f"{recipe}.py:{name}: {number(config)} parameters"]
        lines += differences(first[1].to_dict(), config.to_dict())
    return "\n".join(lines) + "\n"


def leaves(values: Any, where: str) -> list[str]:
    if isinstance(values, dict):
        return [line for name in sorted(values) for line in leaves(values[name], f"{where}.{name}")]
    return [f"{where} = {values!r}"]


def count(config: ConfigDict) -> int:
    channels = config.task.get("frame", 4 if config.task.get("patches") else 1)
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(model_of(config), channels)))


def golden(recipe: str) -> Path:
    return GOLDEN / f"config_{recipe.removeprefix('configs/').replace('/', '_')}.txt"


@pytest.mark.parametrize("counted", grid((False, True), False))
@pytest.mark.parametrize("recipe", RECIPES)
def test_resolved_configs_are_the_golden_ones(recipe, counted):
    text = golden(recipe).read_text()
    expected = (text if counted else re.sub(r": [\d,]+ parameters$", ": ? parameters", text, flags=re.M)).splitlines()
    actual = describe(recipe, counted).splitlines()
    changes = "\n".join(difflib.unified_diff(expected, actual, "golden", "now", lineterm="", n=0))
    assert not changes, f"if this is meant: python -m tests.experiments.test_build\n{changes}"


# Exact counts, and those of the design's table: counts of the published code, with its vocabularies guessed.
PARAMETERS = {
    "lra/listops": (408_116, 0.408e6),
    "lra/text": (632_460, 0.63e6),
    "lra/retrieval": (1_057_194, 1.06e6),
    "lra/image": (1_810_001, 1.81e6),
    "lra/pathfinder": (892_301, 0.89e6),
    "lra/pathx": (1_076_621, 1.08e6),
    "speech/sc10": (298_841, 0.299e6),
    "lm/enwik8": (39_104_674, 39.1e6),
}


# Of the others too: test_resolved_configs_are_the_golden_ones, counted.
@pytest.mark.parametrize("name", grid(tuple(PARAMETERS), "lra/listops", "lm/enwik8"))
def test_recipes_have_as_many_parameters_as_the_published_models(name):
    exact, published = PARAMETERS[name]
    found = count(get_config(f"configs/{name}")())
    assert found == exact
    assert abs(found / published - 1) < 0.02


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_data_the_remedy_is_one_line(recipe, tmp_path, monkeypatch):
    """What to do is said at once: nothing looks for a network, nothing retries."""
    own_data = ("configs/digits", "configs/interp/factors", "configs/interp/prototypes", "configs/pretrain/digits")
    if recipe.startswith(("configs/quickstart", "configs/synthetic", "configs/hyper", *own_data)):
        pytest.skip("generated in memory, or in a package")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked for a network"))
    values = get_config(recipe)().to_dict() | {"data_dir": str(tmp_path)}
    with pytest.raises(UserError) as caught:
        build(values)
    message = str(caught.value)
    assert "\n" not in message
    own = dict.fromkeys(("configs/lm/bytes", "configs/series"), "config.task.files")
    own |= {f"configs/interp/{name}": "--config.task.run=DIR" for name in ("dictionary", "transcoder")}
    remedy = own.get(recipe, "run: python -m experiments.prepare --dataset=")
    assert remedy in message


def test_no_golden_config_is_left_over():
    assert sorted(path.name for path in GOLDEN.glob("config_*.txt")) == sorted(golden(r).name for r in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variant_of_every_config_is_valid(recipe):
    for name, config in variants(recipe).items():
        values = config.to_dict()
        whole = to_dataclass(Config, values, "config")
        task = dict(whole.task)
        to_dataclass(importlib.import_module(f"experiments.tasks.{task.pop('name')}").Config, task, "config.task")
        assert whole.optimizer.warmup_steps < whole.train.steps, name
        assert whole.train.steps % whole.train.checkpoint_every == 0, name
        assert whole.train.checkpoint_every <= whole.train.evaluate_every, name
        assert str(REPOSITORY) not in repr(values)


# The rules of configs/quickstart: golden/test_loss_curve.py.
@pytest.mark.parametrize("recipe", grid(RECIPES, "configs/hyper/rotation"))
def test_the_rules_of_every_optimizer_match_parameters(recipe):
    for config in variants(recipe).values():
        whole = to_dataclass(Config, config.to_dict(), "config")
        make_optimizer(whole.optimizer, whole.train.steps, parameters(model_of(config)))


def test_variants_change_what_they_say():
    (_, paper), (_, same), (_, ours), (_, tiny), (_, full), (_, always), (_, random), (_, none), (_, s4d), (_, both) = (
        variants("configs/lra/text").items()
    )
    assert paper.to_dict() == same.to_dict()
    assert ours.model.router.centered
    assert ours.model.router.eviction_cost
    assert not get_config("configs/lra/text")("credit_router,full").model.router.eviction_cost
    assert not get_config("configs/lra/text")("full,credit_router").model.router.eviction_cost
    assert ours.model.mixer.truncation is None
    assert tiny.model.features < paper.model.features
    assert full.model.window_size is None
    assert full.model.position == "relative"  # the recipe's "slot" has no meaning without a window
    assert always.model.activation == "always"
    assert (random.model.activation, random.model.activation_rate) == ("random", 0.5)
    assert none.model.activation == "never"
    assert s4d.model.mixer.name == "s4d"
    assert both.model.activation == "never"
    assert both.model.features == tiny.model.features


# Those have arms of their own, or no layers.
PLAIN = [r for r in RECIPES if not r.startswith(("configs/hyper", "configs/interp")) and r not in NO_LAYERS]


@pytest.mark.parametrize("recipe", PLAIN)
def test_every_recipe_takes_the_transformer_family(recipe):
    original = get_config(recipe)("tiny").model
    for variant, activation, window, rule in (
        ("transformer,tiny", "always", None, "margin"),
        ("tiny,sliding", "always", original.window_size, "margin"),
        ("tiny,sma_transformer", "learned", original.window_size, "margin"),
        ("tiny,transformer,mod", "learned", None, "capacity"),
    ):
        layer = model_of(get_config(recipe)(variant)).config.encoder.layer
        assert type(layer) is transformer.LayerConfig
        assert (layer.activation, layer.window_size, layer.router.rule) == (activation, window, rule)
        assert (layer.features, layer.dropout, layer.causal) == (original.features, original.dropout, original.causal)
        assert layer.features / layer.heads <= 1.5 * original.key_size
    assert model_of(get_config(recipe)("mod")).config.encoder.layer.router.rule == "capacity"


def test_a_variant_of_another_block_is_refused():
    with pytest.raises(ValueError, match=r"variant 's4d' changes what config.model.block='transformer' does not have"):
        get_config("configs/lra/text")("transformer,s4d")


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown variant 'small': there are paper, credit_router, tiny, full, always"):
        get_config("configs/lra/text")("tiny,small")


def test_values_of_a_config_and_of_its_json_build_the_same(packed):
    values = packed({"optimizer.weight_decays": (("ssm", 0.0),)})
    as_json = {**values, "optimizer": {**values["optimizer"], "weight_decays": [["ssm", 0.0]]}}
    assert build(values).config == build(as_json).config
    assert build(values).values == build(as_json).values


def test_a_description_is_one_line(packed):
    text = build(packed()).describe()
    assert text == (
        "short_listops: 2 layers, width 8, window 4, softmax attention, activation learned, "
        "packed form of 1 x 16 rows, attention by blocks, ema by fft"
    )


def test_a_description_names_the_form_that_this_device_computes(packed, monkeypatch):
    plain = build(packed())
    streams = dataclasses.replace(plain, functions=dataclasses.replace(plain.functions, num_streams=4))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "switched form of 32 x 16 rows, attention by blocks, ema by chunked" in plain.describe()
    assert "packed form of 32 x 16 rows" in streams.describe(), "streams keep packed rows"


# No knob does nothing: each leaf is changed alone, and something that can be observed changes.

MODEL_KNOBS = {
    "layers": 1,
    "features": 16,
    "key_size": 6,
    "value_size": 8,
    "causal": True,
    "attention": False,
    "attention_function": "relu2",
    "position": "rotary",
    "max_positions": 65,
    "feed_forward_size": 8,
    "mixer.state_size": 3,
    "mixer.truncation": 8,
    "mixer.method": "chunked",
    "norm": "rms",
    "norm_placement": "pre",
    "norm_affine": False,
    "activation": "always",
    "dropout": 0.1,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "form": "dense",
    "attention_method": "pallas",
    "block_size": 8,
    "blocks_per_iteration": 2,
    "remat": "none",
    "dtype": "bfloat16",
    "sinusoid": True,
    "head": "linear",
    "window_size": 5,
    "router.centered": True,
    "router.straight_through": True,
    "router.key_credit": True,
    "router.initial_bias": 0.5,
    "router.temperature_scale": 0.5,
    "router.rule": "capacity",
}
# Knobs that matter only together with others.
MORE_MODEL_KNOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "norm_counts_padding": (True, {"norm": "batch"}),
    "final_norm_affine": (False, {"norm_placement": "pre"}),
    "router.credit_share": (0.5, {"router.straight_through": True}),
    "router.credit_sequences": (0.5, {"router.straight_through": True}),
    "router.eviction_cost": (True, {"router.key_credit": True}),
    "router.target_rate": (0.3, {"router.target_rate": 0.6}),
    "router.rate_control": ("exact", {"router.target_rate": 0.3}),
    "router.capacity": (0.3, {"router.rule": "capacity"}),
    "router.capacity_loss": (0.5, {"router.rule": "capacity"}),
    "activation_rate": (0.3, {"activation": "strided", "activation_rate": 0.6}),
    "feed_forward_activation": ("selu", {"feed_forward_size": 8}),
}
UNTOUCHED = {
    "embedding_init": "needs numbers as inputs: test_numbers_as_inputs_need_no_vocabulary",
    "name": "chooses the class: test_the_name_chooses_the_class",
    "layout": "config.mesh makes it: tests/parallel",
    "encoder": "a group, not a leaf",
    "layer": "a group, not a leaf",
    "router": "a group, not a leaf",
    "mixer": "a group, not a leaf",
    "mixer.name": "chooses the file: test_the_mixers_name_chooses_the_file",
    "block": "chooses the file: test_the_blocks_name_chooses_the_file",
    "classes": "the task's",
    "vocabulary_size": "the task's",
}

OPTIMIZER_KNOBS = {
    "name": "radam",
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 3,
    "warmup_start": 1e-6,
    "warmup_power": 2.0,
    "final_learning_rate": 1e-4,
    "b1": 0.8,
    "b2": 0.99,
    "epsilon": 1e-7,
    "weight_decay": 0.1,
    "weight_decays": (("kernel", 0.5),),
    "learning_rate_scales": (("kernel", 0.5),),
    "clip_norm": 0.5,
}
TRAIN_KNOBS = {"batch_size": 10, "accumulate": 2, "activation_penalty": 0.1}
LOOP_KNOBS = {
    "steps": "test_the_schedule_ends_with_the_run, and test_loop.py",
    "log_every": "test_loop.py: test_every_knob_of_the_loop",
    "evaluate_every": "test_loop.py: test_every_knob_of_the_loop",
    "checkpoint_every": "test_loop.py: test_every_knob_of_the_loop",
    "keep_checkpoints": "test_loop.py: test_every_knob_of_the_loop",
    "trackers": "test_loop.py: test_every_knob_of_the_loop",
}


class FakeTask:
    """The sizes of a task, and a loss that reads every logit."""

    classes, vocabulary_size = 3, 5

    @staticmethod
    def loss(out, batch):
        weight = batch["weights"].sum()
        total = (jnp.square(out.logits).sum(1) * batch["weights"]).sum()
        return total, weight, {"loss": (total, weight)}


def batch_of(size: int) -> dict[str, Any]:
    return {
        "inputs": jnp.ones((size, 16), jnp.int32),
        "lengths": jnp.full(size, 12, jnp.int32),
        "targets": jnp.zeros(size, jnp.int32),
        "weights": jnp.ones(size),
    }


def model_texts(values: dict[str, Any]) -> Iterator[str]:
    """What a model computes to initialise itself, and in training with its constants, traced if asked for."""
    model = build_model(to_dataclass(Config, values, "config").model, FakeTask)
    batch, key = batch_of(3), jax.random.key(0)
    initialise = lambda: model.init(key, jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    init, variables = jax.make_jaxpr(initialise, return_shape=True)()
    yield str(init)

    def apply(variables):
        rngs, mutable = {"dropout": key}, ["batch_stats", "terms"]
        return model.apply(variables, batch["inputs"], batch["lengths"], True, rngs=rngs, mutable=mutable)

    program = jax.make_jaxpr(apply)(variables)
    yield f"{program}\n{program.consts}"


def differ(some: Iterable[str], others: Iterable[str]) -> bool:
    return any(one != other for one, other in zip(some, others, strict=True))


def step_text(experiment: Experiment) -> str:
    """What a training step computes, and the initial state."""
    functions, config = experiment.functions, experiment.config
    init, state = jax.make_jaxpr(lambda: functions.init(config.seed), return_shape=True)()
    return f"{init}\n{jax.make_jaxpr(functions.train)(state, batch_of(config.train.batch_size), experiment.seed)}"


# Knobs that the dense form, which is traced in half the time, does not have or does not show.
OF_PACKED_ROWS = {"form", "block_size", "blocks_per_iteration", "attention_method", "attention_function", "position"}


@pytest.fixture(scope="module")
def original_models(packed, tiny) -> Callable[[str], tuple[str, ...]]:
    """What a knob is compared with, traced once for each form."""
    traced = functools.cache(lambda make: tuple(model_texts(make())))
    return lambda knob: traced(packed if knob in OF_PACKED_ROWS else tiny)


@pytest.fixture(scope="module")
def original_step(light) -> str:
    return step_text(light())


def test_every_leaf_of_base_is_perturbed():
    config = base.get_config()

    def names(group: ConfigDict) -> set[str]:
        return {line.split(" = ")[0].removeprefix("x.") for line in leaves(group.to_dict(), "x")}

    others = {"name", "block", "mixer.name", "embedding_init"}
    assert names(config.model) == set(MODEL_KNOBS) | set(MORE_MODEL_KNOBS) | others
    assert names(config.optimizer) == set(OPTIMIZER_KNOBS)
    assert names(config.train) == set(TRAIN_KNOBS) | set(LOOP_KNOBS)
    groups = (LayerConfig, EncoderConfig, ClassifierConfig, RouterConfig, ema.Config)
    fields = {field.name for group in groups for field in dataclasses.fields(group)}
    perturbed = {name.removeprefix("router.").removeprefix("mixer.") for name in (*MODEL_KNOBS, *MORE_MODEL_KNOBS)}
    assert fields - perturbed == set(UNTOUCHED) - {"name", "block", "mixer.name"}
    assert {field.name for field in dataclasses.fields(TrainConfig)} == set(TRAIN_KNOBS) | set(LOOP_KNOBS)


# The others' values are tested with the layers that have them; here, that a config reaches them.
@pytest.mark.parametrize(
    "knob", grid(tuple(MODEL_KNOBS), "layers", "mixer.method", "remat", "sinusoid", "head", "router.rule")
)
def test_every_knob_of_the_model_does_something(packed, tiny, original_models, knob):
    make = packed if knob in OF_PACKED_ROWS else tiny
    assert differ(model_texts(make({f"model.{knob}": MODEL_KNOBS[knob]})), original_models(knob))


@pytest.fixture(scope="module")
def texts_without(tiny) -> Callable[[dict[str, Any]], tuple[str, ...]]:
    """What knobs with this setting are compared with, traced once."""
    traced = functools.cache(lambda *items: tuple(model_texts(tiny(dict(items)))))
    return lambda setting: traced(*setting.items())


# The others' values are tested with the layers that have them, those of the router in tests/layers/test_router.py.
@pytest.mark.parametrize("knob", grid(tuple(MORE_MODEL_KNOBS), "router.target_rate", "feed_forward_activation"))
def test_every_knob_that_needs_another_does_something(tiny, texts_without, knob):
    value, setting = MORE_MODEL_KNOBS[knob]
    without = {f"model.{name}": other for name, other in setting.items()}
    assert differ(model_texts(tiny({**without, f"model.{knob}": value})), texts_without(without))


@pytest.mark.parametrize("knob", TRAIN_KNOBS)
def test_every_knob_of_the_step_does_something(light, original_step, knob):
    assert step_text(light({f"train.{knob}": TRAIN_KNOBS[knob]})) != original_step


def test_the_seed_does_something(light, original_step):
    """It decides the initial parameters and dropout; the order of examples is tested with the tasks."""
    assert step_text(light({"seed": 1})) != original_step


@pytest.mark.parametrize("knob", OPTIMIZER_KNOBS)
def test_every_knob_of_the_optimizer_does_something(packed, knob):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}

    def update(values: dict[str, Any]) -> str:
        config = to_dataclass(Config, values, "config").optimizer
        optimizer = make_optimizer(config, 20, params)
        return str(jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params))

    assert update(packed({f"optimizer.{knob}": OPTIMIZER_KNOBS[knob]})) != update(packed())


def test_the_schedule_ends_with_the_run(packed):
    params = {"kernel": jnp.ones((2, 2))}

    def update(steps: int) -> str:
        optimizer = build(packed({"train.steps": steps})).functions.make_optimizer(params)
        return str(jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params))

    assert update(7) != update(6)


def test_the_name_chooses_the_class(packed):
    values = packed({"model.causal": True})["model"]
    assert isinstance(build_model(values, FakeTask), Classifier)
    only_classifier = ("sinusoid", "head", "embedding_init")
    values = {name: value for name, value in values.items() if name not in only_classifier}
    assert isinstance(build_model({**values, "name": "language_model"}, FakeTask), LanguageModel)


def test_the_mixers_name_chooses_the_file(packed):
    model = build_model(packed({"model.mixer": {"name": "s4d", "state_size": 3}})["model"], FakeTask)
    assert model.config.encoder.layer.mixer == s4d.Config(3)


def test_the_blocks_name_chooses_the_file(packed):
    assert type(build_model(packed()["model"], FakeTask).config.encoder.layer) is LayerConfig
    values = {**packed()["model"], "block": "norm"}
    with pytest.raises(UserError, match=r"config.model.block='norm': seqboat/layers/norm.py holds no LayerConfig"):
        build_model(values, FakeTask)


def test_numbers_as_inputs_need_no_vocabulary(packed):
    sizes = SimpleNamespace(classes=4, vocabulary_size=None)
    model = build_model(packed()["model"], sizes)
    assert model.config.vocabulary_size is None
    normal = build_model(packed({"model.embedding_init": "normal"})["model"], sizes)
    key, inputs = jax.random.key(0), (jnp.ones((1, 1, 1)), jnp.ones(1, jnp.int32))
    biases = [
        jax.jit(lambda init=each.init: init(key, *inputs)["params"]["embedding"]["projection"]["bias"])()
        for each in (model, normal)
    ]
    assert not biases[0].any()
    assert 0.05 < biases[1].std() < 0.2


if __name__ == "__main__":
    for recipe in RECIPES:
        golden(recipe).write_text(describe(recipe))
