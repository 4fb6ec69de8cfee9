"""From a config's values to a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from experiments.common.config import split_fields, to_dataclass
from experiments.common.errors import UserError
from experiments.tasks.conditioned import HyperOptions
from experiments.training.step import arguments, one_element
from seqboat.hyper import Hyper, HyperNetwork, spec
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.models.mlp import MLP, MLPConfig
from seqboat.models.retrieval import DualEncoder, RetrievalConfig
from seqboat.parallel.rules import SINGLE_DEVICE, Layout

# The models of config.model.name, and the fields that a task decides.
MODELS: dict[str, tuple[type, type[nn.Module]]] = {
    "mlp": (MLPConfig, MLP),
    "classifier": (ClassifierConfig, Classifier),
    "retrieval": (RetrievalConfig, DualEncoder),
    "language_model": (LanguageModelConfig, LanguageModel),
}
TASK_SIZES = ("classes", "vocabulary_size")
# Fields that no config sets: the groups are flat there, a task decides its sizes and config.mesh the layout.
DECIDED = ("encoder", "layer", "layout", *TASK_SIZES)
# How often a target is initialised to measure what its initializers draw.
INIT_DRAWS = 64


def dataclasses_of(name: str) -> tuple[type, ...]:
    """Whose fields `config.model` has, beside its name."""
    own = MODELS[name][0]
    layered = "encoder" in {field.name for field in dataclasses.fields(own)}
    return (own, EncoderConfig, LayerConfig) if layered else (own,)


def build_model(values: Mapping[str, Any], sizes: Any, layout: Layout = SINGLE_DEVICE) -> nn.Module:
    """The model of `config.model`: a flat group of the fields of its dataclasses, with a task's sizes; for one device's
    part of a `layout`."""
    where = "config.model"
    name, fields = named(values, where)
    if name not in MODELS:
        raise UserError(f"{where}.name={name!r}: must be one of {', '.join(MODELS)}")
    config_class, model_class = MODELS[name]
    known = {field.name for field in dataclasses.fields(config_class)}
    wanted = [field for field in TASK_SIZES if field in known]
    given = {field: getattr(sizes, field) for field in wanted if hasattr(sizes, field)}
    if len(given) < len(wanted):
        missing = " and no ".join(field for field in wanted if field not in given)
        raise UserError(f"{where}.name={name!r}: this task is not for such a model, it has no {missing}")
    if "vocabulary_size" not in known and getattr(sizes, "vocabulary_size", None) is not None:
        raise UserError(f"{where}.name={name!r} takes numbers, and this task has symbols; take classifier")
    for field in DECIDED:
        if field in fields:
            raise UserError(
                f"{where}.{field}: not set here, {'config.mesh' if field == 'layout' else 'the task'} decides it"
            )
    if "encoder" not in known:
        return model_class(to_dataclass(config_class, {**fields, **given}, where))
    own, encoder, layer = split_fields(fields, *dataclasses_of(name), where=where)
    layer_config = to_dataclass(LayerConfig, {**layer, "layout": layout}, where)
    encoder_config = to_dataclass(EncoderConfig, {**encoder, "layer": layer_config}, where)
    return model_class(to_dataclass(config_class, {**own, **given, "encoder": encoder_config}, where))


def example_of(model: nn.Module, sizes: Any) -> dict[str, np.ndarray] | None:
    """A batch of one sequence of one element, for the model of a task of these sizes; None if its inputs are numbers
    and it does not say how many `channels` they have."""
    pair = (2,) if isinstance(model, DualEncoder) else ()
    inputs = np.zeros((1, 1, *pair), np.int32)
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


def named(group: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    fields = dict(group)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where}.name: missing")
    return name, fields
