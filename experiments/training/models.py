"""From a config's values to a model."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from experiments.common.config import split_fields, to_dataclass
from experiments.common.errors import UserError
from experiments.common.plugs import find
from experiments.tasks.conditioned import HyperOptions
from experiments.training.step import arguments, one_element
from seqboat.choices import given_fields
from seqboat.hyper import Hyper, HyperNetwork, spec
from seqboat.layers.mixer import MixerConfig
from seqboat.models.bottlenecked import Bottlenecked, CodebookConfig, widths
from seqboat.models.coarse_to_fine import CoarseToFine
from seqboat.models.context_autoencoder import ContextAutoencoder
from seqboat.models.encoder import EncoderConfig
from seqboat.models.head import HeadConfig
from seqboat.models.retrieval import DualEncoder
from seqboat.parallel.rules import SINGLE_DEVICE, Layout

# Where the files are that config.model names.
MODELS, BLOCKS, MIXERS = "seqboat.models", "seqboat.layers", "seqboat.layers.mixers"
HEADS = "seqboat.models.heads"
# How often a target is initialised to measure what its initializers draw.
INIT_DRAWS = 64


def dataclasses_of(name: str, block: str = "seqboat") -> tuple[type, ...]:
    """Whose fields `config.model` has, beside `name`, and `block` if it has layers. Raises UserError."""
    own = find(MODELS, name, "config.model.name", "Config", "Model").Config
    if "encoder" not in {field.name for field in dataclasses.fields(own)}:
        return (own,)
    return own, EncoderConfig, find(BLOCKS, block, "config.model.block", "LayerConfig").LayerConfig


def decided(*classes: type) -> tuple[str, ...]:
    """Fields of `dataclasses_of` that no config sets: the groups are flat there, a task decides its sizes, and
    config.mesh the layout."""
    return ("encoder", "layer", "layout", *(field for cls in classes for field in given_fields(cls)))


def make_head(values: Mapping[str, Any], sizes: Any, where: str) -> HeadConfig:
    """The config of a head from a group of its `name` and its fields, with a task's sizes."""
    name, fields = named(values, where)
    config_class = find(HEADS, name, f"{where}.name", "Config").Config
    _refuse_given(fields, given_fields(config_class), where)
    return to_dataclass(config_class, {**fields, **_given(config_class, sizes, f"{where}.name={name!r}")}, where)


def make_mixer(values: Mapping[str, Any], where: str) -> MixerConfig:
    """The config of a mixer from a group of its `name` and its fields."""
    name, fields = named(values, where)
    config_class = find(MIXERS, name, f"{where}.name", "Config").Config
    known = {field.name for field in dataclasses.fields(config_class)}
    if strange := [field for field in fields if field not in known]:
        raise UserError(
            f"{where}.{strange[0]}: mixer {name!r} has no such field; there are {', '.join(sorted(known)) or 'none'}. "
            f"Another mixer comes with its fields by the config's variant :{name}"
        )
    return to_dataclass(config_class, fields, where)


def build_model(values: Mapping[str, Any], sizes: Any, layout: Layout = SINGLE_DEVICE) -> nn.Module:
    """The model of `config.model`: a flat group of the fields of its dataclasses, with a task's sizes; for one device's
    part of a `layout`."""
    where = "config.model"
    name, fields = named(values, where)
    block = fields.pop("block", "seqboat")
    classes = dataclasses_of(name, block)
    given = _given(classes[0], sizes, f"{where}.name={name!r}")
    if "vocabulary_size" not in given and getattr(sizes, "vocabulary_size", None) is not None:
        raise UserError(f"{where}.name={name!r} takes numbers, and this task has symbols; take classifier")
    _refuse_given(fields, decided(*classes), where)
    if isinstance(fields.get("head"), Mapping):
        fields["head"] = make_head(fields["head"], sizes, f"{where}.head")
    model_class = find(MODELS, name, f"{where}.name", "Model").Model
    if len(classes) == 1:
        return model_class(to_dataclass(classes[0], {**fields, **given}, where))
    own, encoder, layer = split_fields(fields, *classes, where=where)
    if "mixer" in layer:
        layer["mixer"] = make_mixer(layer["mixer"], f"{where}.mixer")
    layer_config: Any = to_dataclass(classes[2], {**layer, "layout": layout}, where)
    encoder_config = to_dataclass(EncoderConfig, {**encoder, "layer": layer_config}, where)
    return model_class(to_dataclass(classes[0], {**own, **given, "encoder": encoder_config}, where))


def _refuse_given(fields: Mapping[str, Any], decided: Iterable[str], where: str) -> None:
    for field in decided:
        if field in fields:
            decides = "config.mesh" if field == "layout" else "the task"
            raise UserError(f"{where}.{field}: not set here, {decides} decides it")


def _given(config_class: type, sizes: Any, where: str) -> dict[str, Any]:
    """What a task decides of a model or a head; a field with a default may be missing. Raises UserError for one that is
    not for this task."""
    wanted = given_fields(config_class)
    found = {field: getattr(sizes, field) for field in wanted if hasattr(sizes, field)}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    if missing := [field for field in wanted if field not in found and defaults[field] is dataclasses.MISSING]:
        raise UserError(f"{where}: this task is not for it, it has no {' and no '.join(missing)}")
    return found


def encodes_inputs(model: Any) -> bool:
    """Whether it has one encoder of all elements of its inputs, in order; a context autoencoder's sees some of them,
    and a coarse-to-fine model has two, of their labels."""
    return hasattr(model.config, "encoder") and not isinstance(model, ContextAutoencoder | CoarseToFine)


def example_of(model: nn.Module, sizes: Any) -> dict[str, np.ndarray] | None:
    """A batch of one sequence of one element, for the model of a task of these sizes; None if its inputs are numbers
    and it does not say how many `channels` they have."""
    pair = (2,) if isinstance(model, DualEncoder) else ()
    columns = (2,) if isinstance(model, DualEncoder | ContextAutoencoder) else ()
    inputs = np.zeros((1, 1, *columns), np.int32)
    if getattr(sizes, "vocabulary_size", None) is None:
        if not hasattr(sizes, "channels"):
            return None
        inputs = np.zeros((1, 1, sizes.channels), np.float32)
    return {"inputs": inputs, "lengths": np.ones((1, *pair), np.int32)}


def build_hyper(target: nn.Module, options: HyperOptions, example: Mapping[str, Any]) -> Hyper:
    """The target with generated parameters. The layers of an encoder are stacked."""
    try:
        found = spec(
            target,
            *arguments(one_element({name: example[name] for name in ("inputs", "lengths")})),
            select=options.select,
            exclude=options.exclude,
            stacked="encoder/layers/**" if hasattr(target, "config") and hasattr(target.config, "encoder") else (),
            draws=0 if options.network.init in ("fan_out", "zero") else INIT_DRAWS,
        )
        model = Hyper(target, HyperNetwork(found, options.network))
        model.network.groups()
    except ValueError as error:
        raise UserError(f"config.hypernetwork: {error}") from error
    return model


def build_bottlenecked(target: nn.Module, config: CodebookConfig, example: Mapping[str, Any]) -> Bottlenecked:
    """The target with codebooks at the sites of `config.codebook`."""
    try:
        widths(target, config, *arguments(one_element(example)))
    except ValueError as error:
        raise UserError(f"config.codebook.{error}") from error
    return Bottlenecked(target, config)


def named(group: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    fields = dict(group)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where}.name: missing")
    return name, fields
