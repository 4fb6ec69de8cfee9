"""Our parameters as those of the published PyTorch implementation: the reverse of `published.py`."""

from typing import Any

import jax
import numpy as np

from seqboat.interop.published import Entry, Tree, classifier_entries, layer_entries, some, supported_layer
from seqboat.layers.mixers import ema
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.classifier import ClassifierConfig
from seqboat.paths import flatten, path_keys, unflatten

# Ours -> its names, for what its standalone model has.
NORMS = {"layer": "layernorm", "batch": "batchnorm"}
POSITIONS = {"relative": "simple", "rotary": "rotary"}
ATTENTION = ("softmax", "relu2")


def layer_state(variables: Tree, config: LayerConfig) -> dict[str, np.ndarray]:
    """The state dict of the published layer that computes, in evaluation, what these variables of `SeqBoatLayer` do:
    the reverse of `convert_layer`. The running mean of a centered router becomes part of its bias:

        (m - mean) W + b  =  m W + (b - mean W)

    Raises ValueError for variables that the published layer has no place for.
    """
    return _restate(_uncentered(variables), layer_entries(config))


def classifier_state(variables: Tree, config: ClassifierConfig) -> dict[str, np.ndarray]:
    """The state dict of the published model, like `layer_state`. Raises ValueError as `model_arguments` does."""
    input_size = model_arguments(variables, config)["d_input"]
    variables = jax.tree.map(np.asarray, _uncentered(variables))
    for collection in variables.values():
        encoder = collection.get("encoder", {})
        if "layers" in encoder:  # the reverse of `_stack`
            each = lambda leaf: {str(index): layer for index, layer in enumerate(leaf)}
            encoder["layers"] = jax.tree.map(each, encoder["layers"])
    return _restate(variables, classifier_entries(config, input_size))


def model_arguments(variables: Tree, config: ClassifierConfig) -> dict[str, Any]:
    """The arguments that make the published `SeqBoatModel` this model. Raises ValueError for a model that it cannot
    be."""
    layer = supported_layer(config)
    fixed = {"activation": "learned", "value_size": 2 * layer.features, "norm_affine": True}
    for field, value in fixed.items():
        if getattr(layer, field) != value:
            raise ValueError(f"{field}={getattr(layer, field)!r}: the published model has {value!r}")
    if layer.window_size is None:
        raise ValueError("window_size=None: the published model has a window")
    average = layer.mixer
    if not isinstance(average, ema.Config) or average.truncation is not None:
        raise ValueError(f"mixer={average}: the published model has an EMA with its whole kernel")
    for field, known in (("norm", NORMS), ("position", POSITIONS), ("attention_function", ATTENTION)):
        if getattr(layer, field) not in known:
            raise ValueError(f"{field}={getattr(layer, field)!r}: the published model has {' or '.join(known)}")
    return {
        "d_input": int(variables["params"]["embedding"]["projection"]["kernel"].shape[0]),
        "d_output": config.classes,
        "d_model": layer.features,
        "n_layers": config.encoder.layers,
        "dropout": layer.dropout,
        "prenorm": layer.norm_placement == "pre",
        "max_positions": layer.max_positions,
        "d_qk": layer.key_size,
        "d_ema": average.state_size,
        "mem_size": layer.window_size,
        "bidirectional": not layer.causal,
        "init_temp_scale": layer.router.temperature_scale,
        "norm_type": NORMS[layer.norm],
        "rel_pos_bias": POSITIONS[layer.position],
        "attention_activation": layer.attention_function,
    }


def _uncentered(variables: Tree) -> Tree:
    """Variables of a layer or classifier without the running mean of a centered router, which its bias takes up."""
    leaves, kept = flatten(variables), {}
    for name, leaf in leaves.items():
        if name.startswith("batch_stats/") and name.endswith(
            ("sparse/configurator/mean", "sparse/configurator/batches")
        ):
            continue
        if name.endswith("sparse/configurator/logits/bias"):
            place = name.removesuffix("logits/bias")
            mean = leaves.get(place.replace("params/", "batch_stats/", 1) + "mean")
            kernel = leaves[place + "logits/kernel"]
            leaf = leaf if mean is None else leaf - np.einsum("...d,...dm->...m", mean, kernel)
        kept[name] = leaf
    return unflatten(kept)


def _restate(variables: Tree, entries: dict[str, Entry]) -> dict[str, np.ndarray]:
    """The state dict of these entries. Raises ValueError for leaves that are missing, left over, or of another
    shape."""
    leaves = {path_keys(name): np.asarray(leaf, np.float32) for name, leaf in flatten(variables).items()}
    needed = [path for entry in entries.values() for path in entry.leaves]
    if missing := ["/".join(path) for path in needed if path not in leaves]:
        raise ValueError(f"the published model needs parameters that this one lacks: {some(missing)}")
    if extra := ["/".join(path) for path in leaves if path not in needed]:
        raise ValueError(f"the published model has no place for {some(extra)}")
    state = {}
    for name, entry in entries.items():
        array = np.array(entry.join(*(leaves[path] for path in entry.leaves)), order="C")
        if array.shape != entry.shape:
            raise ValueError(f"{name} would be {array.shape}, and is {entry.shape} in the published model")
        state[name] = array
    return state
