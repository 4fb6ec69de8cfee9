"""From values to dataclasses: every mistake is one line that names the field and says what was expected."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from experiments.common.config import at_most, defaults, differences, split_fields, to_dataclass
from experiments.common.errors import UserError
from experiments.tasks import short_listops
from experiments.training.experiment import Config, TrainConfig, build
from experiments.training.models import build_model
from experiments.training.optimizers import OptimizerConfig
from seqboat.layers.seqboat import LayerConfig
from seqboat.version import CHECKPOINT_FORMAT, migrate


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    limit: int | None = 3
    axis: str | tuple[str, ...] | None = None
    name: str = "x"
    flag: bool = False
    rules: tuple = ()
    bound: float | None = None
    count: int = at_most(2**40, default=0)
    pair: tuple[float, int] = (0.0, 0)
    pairs: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}: must be at least 1")


def test_values_arrive():
    values = {"size": 2, "inner": {"rate": 1}, "limit": None, "axis": ("x", "y"), "flag": True, "rules": (("a", 1),)}
    assert to_dataclass(Outer, values, "config") == Outer(2, Inner(1.0), None, ("x", "y"), "x", True, (("a", 1),))
    assert isinstance(to_dataclass(Outer, values, "config").inner.rate, float)
    assert to_dataclass(Outer, {"size": 2, "inner": Inner(0.25)}, "config").inner.rate == 0.25
    assert to_dataclass(Outer, {"size": 2, "axis": "x"}, "config").axis == "x"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 2, "limt": 3}, "config.limt: unknown field; did you mean 'limit'?"),
        (
            {"size": 2, "colour": 3},
            "config.colour: unknown field; there are axis, bound, count, flag, inner, limit, name, pair, pairs, rules, "
            "size",
        ),
        ({"size": 2, "inner": {"rat": 3}}, "config.inner.rat: unknown field; did you mean 'rate'?"),
        ({}, "config.size: missing"),
        ({"size": 0}, "config.size=0: must be at least 1"),
        ({"size": 2.0}, "config.size=2.0: expected int, got float"),
        ({"size": "2"}, "config.size='2': expected int, got str"),
        ({"size": True}, "config.size=True: expected int, got bool"),
        ({"size": None}, "config.size=None: expected int, got NoneType"),
        ({"size": 2, "limit": "3"}, "config.limit='3': expected int, got str"),
        ({"size": 2, "limit": False}, "config.limit=False: expected int, got bool"),
        ({"size": 2, "name": None}, "config.name=None: expected str, got NoneType"),
        ({"size": 2, "flag": 1}, "config.flag=1: expected bool, got int"),
        ({"size": 2, "inner": 3}, "config.inner=3: expected a group of fields"),
        ({"size": 2, "inner": None}, "config.inner=None: expected a group of fields"),
        ({"size": 2, "inner": {"rate": True}}, "config.inner.rate=True: expected float, got bool"),
        ({"size": 2, "inner": {"rate": "fast"}}, "config.inner.rate='fast': expected float, got str"),
        ({"size": 2, "inner": {"kind": "c"}}, "config.inner.kind='c': must be one of a, b"),
        ({"size": 2, "inner": {"kind": ["a"]}}, "config.inner.kind=['a']: must be one of a, b"),
        ({"size": 2, "axis": 3}, "config.axis=3: expected str | tuple[str, ...] | None"),
        ({"size": 2, "rules": "ab"}, "config.rules='ab': expected tuple, got str"),
        *(
            ({"size": 2, "inner": {"rate": value}}, f"config.inner.rate={value}: must be a finite number of 32 bits")
            for value in (math.nan, math.inf, -math.inf, 1e39, -1e300)
        ),
        ({"size": 2, "inner": {"rate": 10**400}}, "config.inner.rate=inf: must be a finite number of 32 bits"),
        ({"size": 2, "bound": math.inf}, "config.bound=inf: must be a finite number of 32 bits, or None for no limit"),
        ({"size": 2, "rules": (("a", math.nan),)}, "config.rules=nan: must be a finite number of 32 bits"),
        ({"size": 2**31}, "config.size=2147483648: must be at most 2147483647"),
        ({"size": -(10**10)}, "config.size=-10000000000: must be at least -2147483647"),
        ({"size": 10**5000}, "config.size=a number of 16610 bits: must be at most 2147483647"),
        ({"size": 2, "limit": 2**31}, "config.limit=2147483648: must be at most 2147483647"),
        ({"size": 2, "rules": ((2**31,),)}, "config.rules=2147483648: must be at most 2147483647"),
        ({"size": 2, "pair": (1.0,)}, "config.pair=(1.0,): expected 2 items"),
        ({"size": 2, "pair": (1.0, 2.0)}, "config.pair=2.0: expected int, got float"),
        ({"size": 2, "pairs": ("a", "b")}, "config.pairs='a': expected a tuple"),
        ({"size": 2, "pairs": (("a", 1.0), ("b", "c"))}, "config.pairs='c': expected float, got str"),
        ({"size": 2, "pairs": (("a", math.nan),)}, "config.pairs=nan: must be a finite number of 32 bits"),
        ({"size": 2, "count": 2**40 + 1}, "config.count=1099511627777: must be at most 1099511627776"),
        ({"size": 2, "name": "a\0b"}, r"config.name='a\x00b': must be text in UTF-8 without NUL"),
        ({"size": 2, "axis": ("x", "\udcff")}, r"config.axis='\udcff': must be text in UTF-8 without NUL"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(UserError) as caught:
        to_dataclass(Outer, values, "config")
    assert str(caught.value) == message


def test_the_largest_numbers_arrive():
    values = {"size": 2**31 - 1, "count": 2**40, "bound": 3.4e38, "limit": -(2**31 - 1), "pairs": (("a", 1.0),)}
    found = to_dataclass(Outer, values, "config")
    assert {name: getattr(found, name) for name in values} == values


def test_defaults_are_those_of_the_dataclass_with_their_types():
    config = defaults(Outer, but=("kind", "axis"), size=2, bound=0.5)
    assert config.to_dict() == {
        **{"size": 2, "inner": {"rate": 0.5}, "limit": 3, "name": "x", "flag": False, "rules": (), "bound": 0.5},
        **{"count": 0, "pair": (0.0, 0), "pairs": ()},
    }
    assert to_dataclass(Outer, config.to_dict(), "config") == Outer(2, bound=0.5)
    config.limit = None
    config.limit = 7
    for field, value in {"limit": "7", "bound": "0.5", "flag": 1, "pairs": "a"}.items():
        with pytest.raises(TypeError):
            config[field] = value
    with pytest.raises(TypeError, match="size has no default"):
        defaults(Outer)
    with pytest.raises(TypeError, match="sise: no such fields of Outer"):
        defaults(Outer, size=2, sise=3)


def test_split_fields():
    assert split_fields({"size": 1, "rate": 2.0}, Outer, Inner, where="config") == [{"size": 1}, {"rate": 2.0}]
    with pytest.raises(UserError, match=r"^config\.kinds: unknown field; did you mean 'kind'\?$"):
        split_fields({"kinds": 1}, Outer, Inner, where="config")


def test_differences_name_the_leaves():
    old = {"model": {"layers": 2, "rules": [["a", 1]], "gone": 1}, "seed": 0, "same": [1, [2]]}
    new = {"model": {"layers": 3, "rules": (("a", 1),), "added": None}, "seed": 0, "same": (1, (2,))}
    assert differences(old, old) == []
    assert differences({"a\x1b[31m\nb": 1}, {}) == [r"config.a\x1b[31m\nb: 1 -> None"]
    assert differences(old, new) == ["config.model.gone: 1 -> None", "config.model.layers: 2 -> 3"]


# What the dataclasses of an experiment refuse, in the words of the config.

TASK = short_listops.Task(short_listops.Config(20, 5, 5), batch_size=5, seed=0)
MODEL = {"name": "classifier", "layers": 2, "features": 8, "key_size": 4, "value_size": 16}

MODEL_MISTAKES = [
    *(({name: 0}, f"{name}=0: must be at least 1") for name in ("features", "key_size", "value_size")),
    ({"mixer": {"name": "ema", "state_size": 0}}, "mixer.state_size=0: must be at least 1"),
    *(
        ({name: 0}, f"{name}=0: must be at least 1")
        for name in ("max_positions", "block_size", "blocks_per_iteration", "layers")
    ),
    ({"window_size": 0}, "window_size=0: must be at least 1, or None for no limit"),
    ({"mixer": {"name": "ema", "truncation": 0}}, "mixer.truncation=0: must be at least 1, or None for no limit"),
    *(({name: 1.0}, f"{name}=1.0: must be in [0, 1)") for name in ("dropout", "hidden_dropout", "attention_dropout")),
    ({"dropout": -0.1}, "dropout=-0.1: must be in [0, 1)"),
    ({"attention_function": "relu"}, "attention_function='relu': must be one of softmax, relu2, laplace"),
    ({"position": "learned"}, "position='learned': must be one of none, relative, slot, rotary, t5"),
    ({"mixer": {"state_size": 4}}, "mixer.name: missing"),
    (
        {"mixer": {"name": "s4d", "method": "fft"}},
        "mixer.method: mixer 's4d' has no such field; there are state_size, truncation. Another mixer comes "
        "with its fields by the config's variant :s4d",
    ),
    ({"norm": "group"}, "norm='group': must be one of layer, scale, rms, batch"),
    ({"norm_placement": "both"}, "norm_placement='both': must be one of pre, post"),
    ({"activation": "relu"}, "activation='relu': must be one of learned, always, never, random, strided"),
    ({"activation_rate": 0.5}, "activation_rate=0.5: only activation='random' and 'strided' have a given rate"),
    ({"form": "sparse"}, "form='sparse': must be one of packed, dense, switched"),
    ({"dtype": "float16"}, "dtype='float16': must be one of float32, bfloat16"),
    ({"remat": "all"}, "remat='all': must be one of none, selective, layer"),
    ({"head": "deep"}, "head='deep': must be one of mlp, linear, or the group of a head"),
    ({"feed_forward_activation": "relu"}, "feed_forward_activation='relu': must be one of silu, selu"),
    ({"feed_forward_size": -1}, "feed_forward_size=-1: must be 0 (none) or more"),
    (
        {"position": "slot", "window_size": None},
        "position='slot' needs a window_size: its table covers the distances within a window",
    ),
    ({"attention_method": "flash"}, "attention_method='flash': must be one of auto, blocks, pallas"),
    (
        {"attention_method": "pallas", "attention_dropout": 0.1},
        "attention_method='pallas': the kernel has no attention_dropout=0.1; use 'blocks'",
    ),
    ({"attention_method": "pallas", "form": "dense"}, "attention_method='pallas': only form='packed' has a kernel"),
    (
        {"position": "rotary", "key_size": 3},
        "key_size=3: rotary positions rotate pairs of channels, so it must be even",
    ),
    ({"router": {"temperature_scale": 0.0}}, "router.temperature_scale=0.0: must be positive"),
    ({"router": {"centred": True}}, "router.centred: unknown field; did you mean 'centered'?"),
    ({"router": {"initial_bias": "high"}}, "router.initial_bias='high': expected float, got str"),
    ({"features": 8.5}, "features=8.5: expected int, got float"),
    ({"window": 8}, "window: unknown field; did you mean 'window_size'?"),
    ({"classes": 3}, "classes: not set here, the task decides it"),
    ({"vocabulary_size": 3}, "vocabulary_size: not set here, the task decides it"),
    ({"layer": {}}, "layer: not set here, the task decides it"),
    (
        {"name": "transformer"},
        "name='transformer': there is no file seqboat/models/transformer.py; there are autoencoder, bottlenecked, "
        "classifier, coarse_to_fine, context_autoencoder, dictionary, encoder, frames, head, heads, "
        "language_model, mlp, retrieval, stackvae",
    ),
    ({"name": None}, "name: missing"),
    ({"name": "language_model"}, "causal=False: a language model needs causal layers"),
    (
        {"name": "language_model", "causal": True, "norm": "batch"},
        "norm='batch': its statistics look ahead; a language model needs layer, scale or rms",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MODEL_MISTAKES)
def test_mistakes_in_a_model(changes, message):
    with pytest.raises(UserError) as caught:
        build_model({**MODEL, **changes}, TASK.config)
    assert str(caught.value) == f"config.model.{message}"


def test_every_choice_of_the_layer_is_guarded():
    """A new field with choices needs a line above."""
    named = {name for changes, _ in MODEL_MISTAKES for name in changes}
    free = {"attention", "norm_affine", "norm_counts_padding", "layout"}  # nothing to refuse
    assert {field.name for field in dataclasses.fields(LayerConfig)} - named == free


def test_a_missing_width():
    with pytest.raises(UserError, match=r"^config\.model\.features: missing$"):
        build_model({name: value for name, value in MODEL.items() if name != "features"}, TASK.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name}=0: must be at least 1") for name in ("batch_size", "accumulate", "log_every")),
        *(({name: 0}, f"{name}=0: must be at least 1") for name in ("evaluate_every", "checkpoint_every")),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0: must be at least 1"),
        ({"steps": -1}, "steps=-1: must not be negative"),
        ({"steps": "abc"}, "steps='abc': expected int, got str"),
        ({"accumulate": 3}, "accumulate=3: must divide batch_size=8"),
        ({"activation_penalty": -0.5}, "activation_penalty=-0.5: must not be negative"),
        ({"stesp": 3}, "stesp: unknown field; did you mean 'steps'?"),
    ],
)
def test_mistakes_in_training(changes, message):
    with pytest.raises(UserError) as caught:
        to_dataclass(TrainConfig, {"steps": 6, "batch_size": 8, **changes}, "config.train")
    assert str(caught.value) == f"config.train.{message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer.name": "lien"},
            "config.optimizer.name='lien': must be one of adamw, radam, sgd, or an optimizer",
        ),
        (
            {"optimizer.name": "lbfgs"},
            "config.optimizer.name='lbfgs': optax.lbfgs does not run on gradients, parameters",
        ),
        ({"optimizer.b2": 1.0}, r"config.optimizer.b2=1.0: must be in [0, 1)"),
        (
            {"optimizer.clip_norm": math.inf},
            "config.optimizer.clip_norm=inf: must be a finite number of 32 bits, or None",
        ),
        ({"optimizer.clip_norm": 0.0}, "config.optimizer.clip_norm=0.0: must be positive, or None for no limit"),
        ({"train.steps": 10**10}, "config.train.steps=10000000000: must be at most 2147483647"),
        ({"model.block_size": 2**31}, "config.model.block_size=2147483648: must be at most 2147483647"),
        ({"task.data_seed": 2**63}, "config.task.data_seed=9223372036854775808: must be at most"),
        ({"optimizer.learning_rate": 0.0}, "config.optimizer.learning_rate=0.0: must be positive"),
        ({"seed": -1}, "config.seed=-1: must be in 0..4294967295"),
        ({"seed": 2**32}, "config.seed=4294967296: must be in 0..4294967295"),
        ({"task.name": "imdb"}, "config.task.name='imdb': there is no file experiments/tasks/imdb.py"),
        ({"task.name": "../x"}, "config.task.name='../x': there is no file experiments/tasks/../x.py"),
        ({"task.name": "base"}, "config.task.name='base': experiments/tasks/base.py holds no Config"),
        ({"task.train_examples": 0}, "config.task.train_examples=0: must be at least 1"),
        ({"task.data_seed": "x"}, "config.task.data_seed='x': expected int, got str"),
        ({"task.length": 5}, "config.task.length: unknown field; there are"),
        ({"trian": {}}, "config.trian: unknown field; did you mean 'train'?"),
        ({"optimizer": None}, "config.optimizer=None: expected a group of fields"),
        ({"model": 3}, "config.model=3: expected dict, got int"),
        ({"data_dir": 3}, "config.data_dir=3: expected str, got int"),
    ],
)
def test_mistakes_in_an_experiment(tiny, changes, message):
    values = tiny()
    for path, value in changes.items():
        group, _, field = path.rpartition(".")
        (values[group] if group else values)[field] = value
    with pytest.raises(UserError) as caught:
        build(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def numbers(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{where}.{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{where}.{name}", value


def test_every_number_of_a_config_is_bounded(tiny):
    """Whoever adds a field gets this for nothing."""
    found = dict(numbers(tiny(), "config"))
    assert len(found) > 30
    for path, value in found.items():
        for wrong in (10**30,) if isinstance(value, int) else (math.nan, math.inf, -math.inf):
            values = tiny()
            *groups, field = path.split(".")[1:]
            functools.reduce(lambda group, name: group[name], groups, values)[field] = wrong
            with pytest.raises(UserError, match=rf"^{re.escape(path)}=.*: must be (a finite|at most|in )"):
                build(values)


def test_the_groups_of_a_config_are_the_dataclasses(tiny):
    config = to_dataclass(Config, tiny(), "config")
    assert isinstance(config.optimizer, OptimizerConfig)
    assert isinstance(config.train, TrainConfig)
    assert config.data_dir is None


def test_a_checkpoint_that_was_not_clipped_can_still_be_read(tiny):
    values = tiny()
    values["optimizer"]["clip_norm"] = math.inf
    meta = {"format": "seqboat", "format_version": 1, "config": values}
    migrated = migrate(meta)["config"]
    assert differences(values, migrated) == ["config.optimizer.clip_norm: inf -> None"]
    assert build(migrated).config.optimizer.clip_norm is None
    today = {**meta, "format_version": CHECKPOINT_FORMAT, "config": None}
    for other in ({}, {"config": 3}, {"config": {"optimizer": 3}}, {"config": tiny()}):
        assert migrate({**meta, "config": None, **other}) == {**today, **other}
