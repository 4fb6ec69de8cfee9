"""The version, the checkpoint format, and migrations of older checkpoints."""

import math
import re
from collections.abc import Callable

__version__ = "0.1.0"

CHECKPOINT_FORMAT = 4
"""The number in every checkpoint, incremented when older checkpoints need a migration: for a renamed config field or
another layout of the state."""

# Format 2 gave these their standard names. Config fields by path:
_RENAMED_FIELDS = {
    ("task", "carry"): "carry_state",
    ("task", "deviation"): "std",
    ("model", "blocks_per_trip"): "blocks_per_iteration",
    ("train", "activation_price"): "activation_penalty",
    ("hyper",): "hypernetwork",
}
_RENAMED_METRICS = {"bits": "bits_per_byte"}


def _to_format_2(meta: dict) -> dict:
    config = meta.get("config")
    if not isinstance(config, dict):
        return meta
    for path, new in _RENAMED_FIELDS.items():
        config = _rename(config, path, new)
    if isinstance(config.get("mesh"), str):
        config["mesh"] = re.sub(r"\btensor\b", "fsdp_hidden", config["mesh"])
    generated = config.get("hypernetwork")
    if isinstance(generated, dict) and generated.get("condition") == "price":
        config["hypernetwork"] = {**generated, "condition": "penalty"}
    return {**meta, "config": config}


def _rename(group: dict, path: tuple[str, ...], new: str) -> dict:
    """A nested dictionary with the field at `path` renamed, in the same position."""
    first, rest = path[0], path[1:]
    if not rest:
        return {new if name == first else name: value for name, value in group.items()}
    inner = group.get(first)
    return {**group, first: _rename(inner, rest, new)} if isinstance(inner, dict) else dict(group)


def _to_format_3(meta: dict) -> dict:
    """One switch for all trackers."""
    config = meta.get("config")
    train = config.get("train") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(train, dict) or "tensorboard" not in train:
        return meta
    trackers = ["tensorboard"] if train["tensorboard"] is True else []
    train = {"trackers" if name == "tensorboard" else name: value for name, value in train.items()}
    return {**meta, "config": {**config, "train": {**train, "trackers": trackers}}}


# Format 4 made them the group config.model.mixer. S4D had a field of the EMA, which changed nothing.
_MIXER_FIELDS = {"ssm": "name", "state_size": "state_size", "ssm_truncation": "truncation", "ema_method": "method"}


def _to_format_4(meta: dict) -> dict:
    """A mixer has its own fields, in a group."""
    config = meta.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(model, dict) or "mixer" in model or model.get("name") == "mlp":
        return meta
    mixer = {"name": "ema", **{new: model[old] for old, new in _MIXER_FIELDS.items() if old in model}}
    if mixer["name"] != "ema":
        mixer.pop("method", None)
    model = {name: value for name, value in model.items() if name not in _MIXER_FIELDS}
    return {**meta, "config": {**config, "model": {**model, "block": "seqboat", "mixer": mixer}}}


MIGRATIONS: dict[int, Callable[[dict], dict]] = {1: _to_format_2, 2: _to_format_3, 3: _to_format_4}
"""`MIGRATIONS[n]` turns the meta dictionary (config, versions) of a checkpoint of format n into one of format n + 1."""


def metric_today(name: str) -> str:
    """The current name of a metric called `name` in a checkpoint or metrics file of any format."""
    return _RENAMED_METRICS.get(name, name)


def migrate(meta: dict) -> dict:
    """The meta dictionary of a checkpoint, migrated to the current format step by step.

    Raises ValueError, with a message that continues "the checkpoint", for a checkpoint that was not written by seqboat,
    is newer, or is too old.
    """
    number = meta.get("format_version")
    if meta.get("format") != "seqboat" or type(number) is not int:
        raise ValueError("was not written by seqboat: choose another directory")
    if number > CHECKPOINT_FORMAT:
        raise ValueError(f"has format {number}, this seqboat reads up to {CHECKPOINT_FORMAT}: update seqboat")
    for old in range(number, CHECKPOINT_FORMAT):
        if old not in MIGRATIONS:
            raise ValueError(f"has format {number}, this seqboat has no migration from {old}: use an older seqboat")
        meta = MIGRATIONS[old](meta)
    return {**_without_infinity(meta), "format_version": CHECKPOINT_FORMAT}


def _without_infinity(meta: dict) -> dict:
    """Clipping used to be disabled by infinity, which JSON cannot hold; now by None."""
    config = meta.get("config")
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    if not isinstance(optimizer, dict) or optimizer.get("clip_norm") != math.inf:
        return meta
    return {**meta, "config": {**config, "optimizer": {**optimizer, "clip_norm": None}}}  # type: ignore[dict-item]
