"""What every experiment shares. A config is a difference from this one.

Every field has the default of its dataclass: its docstring says what it means, and only what has none is written here.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments.common.config import defaults
from experiments.common.plugs import find, holds, names
from experiments.tasks.conditioned import HyperOptions
from experiments.training.experiment import Config, TrainConfig
from experiments.training.models import BLOCKS, HEADS, MIXERS, dataclasses_of, decided
from experiments.training.optimizers import OptimizerConfig
from seqboat.choices import choices, given_fields
from seqboat.models.bottlenecked import CodebookConfig

__all__ = ["codebook", "get_config", "hyper", "placeholder"]

# The other groups of a `Config`, which are not dataclasses, or are not in every config.
_GROUPS = ("task", "model", "optimizer", "train", "hypernetwork", "objectives", "codebook")
# The widths of a small model; a recipe has its own.
_WIDTHS = {"layers": 2, "features": 64, "key_size": 32, "value_size": 128}


# Reference only: no recipe changes these. They stay where they are because checkpoints carry them.
#   model: attention, form, mixer.method, norm_affine, norm_counts_padding, hidden_dropout, attention_dropout,
#       router.initial_bias
#   optimizer: weight_decays, learning_rate_scales
#   hypernetwork.network: rank, chunk_size, chunk_embedding, negative_slope, target_gain, dtype, heads, and of encoding
#       low, high, size, unit_norm


def get_config(model: str = "classifier") -> ConfigDict:
    """`model` is config.model.name: classifier, frames, retrieval, language_model, mlp, dictionary or autoencoder."""
    config = defaults(Config, but=_GROUPS)
    config.task = ConfigDict()
    config.model = _model(model)
    config.optimizer = defaults(OptimizerConfig)
    config.train = defaults(TrainConfig, steps=1000, batch_size=32)
    return config


def _model(name: str) -> ConfigDict:
    classes = dataclasses_of(name)
    layered = len(classes) > 1
    given = {**_WIDTHS, "causal": name == "language_model"} if layered else {}
    # A language model's head is in those configs alone that change it: checkpoints are older than the field.
    but = ("mixer", "head") if name == "language_model" else ("mixer",)
    config = defaults(*classes, but=(*decided(*classes), *but), **given)
    config.name = name
    if layered:
        config.update(block="seqboat", mixer=mixer("ema"))
    return config


def mixer(name: str) -> ConfigDict:
    """For `config.model.mixer`: a file of seqboat/layers/mixers, and the defaults of its fields."""
    config = defaults(find(MIXERS, name, "config.model.mixer.name", "Config").Config)
    config.name = name
    return config


def mixers() -> list[str]:
    """What `mixer` may be called with."""
    return names(MIXERS)


def head(name: str, **fields: Any) -> ConfigDict:
    """For `config.model.head`: a file of seqboat/models/heads, and its fields, the others with their defaults."""
    own = find(HEADS, name, "config.model.head.name", "Config").Config
    config = defaults(own, but=given_fields(own), **fields)
    config.name = name
    return config


def block(model: ConfigDict, name: str) -> ConfigDict:
    """`config.model` with the layers of another block, a file of seqboat/layers. Fields of the same name keep their
    values, where the block takes them; the others have its defaults."""
    classes = dataclasses_of(model.name, name)
    own = {field.name for cls in classes for field in dataclasses.fields(cls)}
    taken = {field: values for cls in classes for field, values in choices(cls).items()}
    kept = {field: value for field, value in model.items() if field in own and value in taken.get(field, (value,))}
    missing = {"mixer", "head"} - set(kept)  # a head that is not there is that of a language model
    config = defaults(*classes, but=(*decided(*classes), *missing), **kept)
    if "mixer" in own and "mixer" not in kept:
        config.mixer = mixer("ema")
    config.update(name=model.name, block=name)
    return config


def blocks() -> list[str]:
    """What `block` may be called with: every file with a `LayerConfig`, but config.py, whose block is seqboat."""
    return [name for name in names(BLOCKS) if name != "config" and holds(BLOCKS, name, "LayerConfig")]


def objective(name: str, **fields: Any) -> ConfigDict:
    """For `config.objectives`: a file of experiments/objectives, and its fields, the others with their defaults."""
    own = find("experiments.objectives", name, "config.objectives", "Config", "Objective").Config
    return ConfigDict({name: defaults(own, **fields)})


def hyper(condition: str) -> ConfigDict:
    """For `config.hypernetwork`: magnitude-invariant parametrizations, every parameter generated."""
    # Only the encoding "embedding" has tasks, which none of the conditions is.
    return defaults(HyperOptions, but=("tasks",), condition=condition)


def codebook() -> ConfigDict:
    """For `config.codebook`: codebooks at m of every layer."""
    return defaults(CodebookConfig)
