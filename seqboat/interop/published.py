"""Parameters of the published PyTorch implementation (renll/SeqBoat), turned into ours.

The state dict is a mapping of names to arrays, as its standalone layer and model write it; reading it from a file is
the caller's. A Linear's weight is transposed, `hx_proj` is split into router and skip path, layers are stacked.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from seqboat.layers.mixers import ema
from seqboat.layers.router import Pattern
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.classifier import ClassifierConfig
from seqboat.models.heads import linear
from seqboat.ops.positions import T5_BUCKETS

Path = tuple[str, ...]
Tree = dict[str, Any]
# Counts forward passes; it has no meaning without PyTorch's cumulative average.
IGNORED = "num_batches_tracked"
# What DistributedDataParallel and Lightning put in front of every name, and torch.compile in front of a module's.
WRAPPERS, COMPILED = ("module.", "model."), "_orig_mod"


class Form(NamedTuple):
    """How an array of a state dict becomes a leaf of ours, and the reverse (`to_published.py`)."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda a: a, lambda a: a)
TRANSPOSED = Form(np.transpose, np.transpose)
COLUMN = Form(lambda a: a[..., 0], lambda a: a[..., None])  # a last axis of one number, which ours lacks


class Entry(NamedTuple):
    """One array of a state dict: its shape; what becomes of it, our path -> function of the array; and the function
    that makes it from these leaves again."""

    shape: tuple[int, ...]
    leaves: dict[Path, Callable[[np.ndarray], np.ndarray]]
    join: Callable[..., np.ndarray]


def convert_ema(state: Mapping[str, np.ndarray], features: int, state_size: int, causal: bool) -> Tree:
    """Variables of `layers.mixers.ema.EMA` from a state dict of the published `MultiHeadEMA`."""
    return _convert(state, _ema_entries("", (), features, state_size, causal))


def convert_layer(state: Mapping[str, np.ndarray], config: LayerConfig) -> Tree:
    """Variables of `layers.seqboat.SeqBoatLayer` from a state dict of the published layer.

    Entries may be of any floating point kind; what PyTorch's wrappers put in front of every name is taken off. Raises
    ValueError with how many entries are missing, unexpected, of another shape or no such numbers, and three of each.
    """
    return _convert(state, layer_entries(config))


def convert_classifier(state: Mapping[str, np.ndarray], config: ClassifierConfig, input_size: int) -> Tree:
    """Variables of `models.classifier.Classifier` from a state dict of the published model for numbers (B, L, F).

    The config must be that model's: no vocabulary, a linear head. Raises ValueError like `convert_layer`.
    """
    variables = _convert(state, classifier_entries(config, input_size))
    for collection in variables.values():
        if "layers" in collection.get("encoder", {}):
            collection["encoder"]["layers"] = _stack(collection["encoder"]["layers"])
    return variables


def supported_layer(config: ClassifierConfig) -> LayerConfig:
    """The layers of a classifier that the published model can be. Raises ValueError for another one."""
    layer = config.encoder.layer
    if not isinstance(layer, LayerConfig):
        raise ValueError(f"{type(layer).__module__}: the published model has SeqBoat layers")
    if config.vocabulary_size is not None or config.head not in ("linear", linear.Config()) or config.sinusoid:
        raise ValueError(
            "the published model takes numbers, without a sinusoid, and has a linear head: vocabulary_size=None, "
            "head='linear', sinusoid=False"
        )
    return layer


def classifier_entries(config: ClassifierConfig, input_size: int) -> dict[str, Entry]:
    layer, encoder = supported_layer(config), ("encoder",)
    width = layer.features
    entries = {}
    for index in range(config.encoder.layers):
        for name, entry in layer_entries(layer).items():
            leaves: dict[Path, Callable] = {
                (path[0], *encoder, "layers", *path[1:], str(index)): convert for path, convert in entry.leaves.items()
            }
            entries[f"seq_layers.{index}.{name}"] = entry._replace(leaves=leaves)
    entries |= _dense("encoder", ("params", "embedding", "projection"), input_size, width)
    entries |= _dense("decoder", ("params", "head"), width, config.classes)
    if layer.norm_placement == "pre":
        entries |= _norm_entries("final_norm.norm.", "encoder", "final_norm", config=layer)
    return entries


def layer_entries(config: LayerConfig) -> dict[str, Entry]:
    average, unit = config.mixer, config.attention and config.activation != "never" and not config.feed_forward_size
    if not isinstance(average, ema.Config) or not unit:
        raise ValueError("the published layer has an EMA and one module, the gated attention unit")
    width, key, value = config.features, config.key_size, config.value_size
    entries = _ema_entries("ssm.", ("ssm",), width, average.state_size, config.causal)
    entries |= _norm_entries("norm.norm.", "norm", config=config)
    entries |= _dense("mx_proj", ("params", "gau", "projection"), width, key + 2 * value)
    entries |= _dense("h_proj", ("params", "gau", "output"), value, width)
    for name in ("gamma", "beta"):
        entries[name] = _entry((2, key), ("params", "gau", name))
    table = ("params", "gau", "position_bias")
    if config.position == "relative":
        entries["rel_pos_bias.rel_pos_bias"] = _entry((2 * config.max_positions - 1,), table)
    elif config.position == "slot":
        entries["rel_pos_bias.rel_pos_bias"] = _entry((6 * (config.window_size or 0) - 1,), table)
    elif config.position == "t5":
        entries["rel_pos_bias.relative_attention_bias"] = _entry((T5_BUCKETS, 1), table, COLUMN)
    options = 0 if config.activation in get_args(Pattern) else 2
    skip, logits = ("params", "skip_projection"), ("params", "sparse", "configurator", "logits")
    weight: dict[Path, Callable] = {(*skip, "kernel"): lambda a: a[options:].T}
    bias: dict[Path, Callable] = {(*skip, "bias"): lambda a: a[options:]}
    if options:
        weight[(*logits, "kernel")] = lambda a: a[:options].T
        bias[(*logits, "bias")] = lambda a: a[:options]
        entries["q_router.temp"] = _entry((1,), ("params", "sparse", "configurator", "log_temperature"))
    join = lambda skip, *router: np.concatenate([leaf.T for leaf in (*router, skip)])
    return entries | {
        "hx_proj.weight": Entry((options + width, width), weight, join),
        "hx_proj.bias": Entry((options + width,), bias, join),
    }


def _ema_entries(prefix: str, path: Path, width: int, state_size: int, causal: bool) -> dict[str, Entry]:
    rows = width if causal else 2 * width
    entries = {
        f"{prefix}{name}": _entry((rows, state_size, 1), ("params", *path, name), COLUMN)
        for name in ("delta", "alpha", "beta")
    }
    entries[f"{prefix}gamma"] = _entry((rows, state_size), ("params", *path, "gamma"))
    entries[f"{prefix}omega"] = _entry((width,), ("params", *path, "omega"))
    return entries


def _norm_entries(prefix: str, *path: str, config: LayerConfig) -> dict[str, Entry]:
    shape = (config.features,)
    entries: dict[str, Entry] = {}
    if config.norm in ("layer", "batch") and config.norm_affine:
        entries["weight"] = _entry(shape, ("params", *path, "scale"))
        entries["bias"] = _entry(shape, ("params", *path, "offset"))
    if config.norm == "batch":
        entries["running_mean"] = _entry(shape, ("batch_stats", *path, "mean"))
        entries["running_var"] = _entry(shape, ("batch_stats", *path, "variance"))
    if config.norm == "rms" and config.norm_affine:
        entries["weight"] = _entry(shape, ("params", *path, "scale"))
    if config.norm == "scale" and config.norm_affine:
        entries["scalar"] = _entry((1,), ("params", *path, "scale"), COLUMN)
    return {prefix + name: entry for name, entry in entries.items()}


def _dense(name: str, path: Path, inputs: int, outputs: int) -> dict[str, Entry]:
    return {
        f"{name}.weight": _entry((outputs, inputs), (*path, "kernel"), TRANSPOSED),
        f"{name}.bias": _entry((outputs,), (*path, "bias")),
    }


def _entry(shape: tuple[int, ...], path: Path, form: Form = SAME) -> Entry:
    return Entry(shape, {path: form.ours}, form.theirs)


def _convert(state: Mapping[str, np.ndarray], entries: dict[str, Entry]) -> Tree:
    found = {name: np.asarray(array) for name, array in _bare(state).items() if not name.endswith(IGNORED)}
    shared = [name for name in entries if name in found]
    wrong = {
        "missing": [f"{name} {entry.shape}" for name, entry in entries.items() if name not in found],
        "unexpected": [f"{name} {array.shape}" for name, array in found.items() if name not in entries],
        "of another shape": [
            f"{name} {found[name].shape} instead of {entries[name].shape}"
            for name in shared
            if found[name].shape != entries[name].shape
        ],
        # Not numpy's idea of floating, which knows no bfloat16.
        "not floating point numbers": [
            f"{name} {found[name].dtype}" for name in shared if not jnp.issubdtype(found[name].dtype, jnp.floating)
        ],
    }
    if any(wrong.values()):
        if prefix := _other_prefix(found, entries):
            raise ValueError(f"of the state dict only a prefix differs: every name begins with {prefix!r}; remove it")
        faults = "; ".join(f"{len(names)} {fault}: {some(names)}" for fault, names in wrong.items() if names)
        raise ValueError(f"the state dict does not fit the config: {faults}")
    variables: Tree = {}
    for name, entry in entries.items():
        for path, convert in entry.leaves.items():
            parent = functools.reduce(lambda tree, key: tree.setdefault(key, {}), path[:-1], variables)
            parent[path[-1]] = np.array(convert(found[name]), np.float32, order="C")
    return variables


def _bare(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries without what PyTorch's wrappers put in front of every name; torch.compile does it anywhere."""
    names = {name: ".".join(part for part in name.split(".") if part != COMPILED) for name in state}
    while any(names and all(name.startswith(prefix) for name in names.values()) for prefix in WRAPPERS):
        names = {name: bare.partition(".")[2] for name, bare in names.items()}
    return {bare: state[name] for name, bare in names.items()}


def _other_prefix(found: Mapping[str, Any], entries: Mapping[str, Any]) -> str | None:
    """What all names begin with and should not, if nothing else is wrong with them."""
    first = next(iter(entries))
    prefixes = (name.removesuffix(first) for name in found if name.endswith(f".{first}"))
    return next((prefix for prefix in prefixes if {prefix + name for name in entries} == set(found)), None)


def some(names: list[str]) -> str:
    """Three of them."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _stack(tree: Tree) -> Any:
    """Leaves {"0": a, "1": b, ...}, one a layer, stacked on a first axis."""
    if all(isinstance(leaf, np.ndarray) for leaf in tree.values()):
        return np.stack([tree[str(index)] for index in range(len(tree))])
    return {name: _stack(branch) for name, branch in tree.items()}
