"""The version, and the format of checkpoints and what this code does with older ones."""

import math
from collections.abc import Callable

__version__ = "0.1.0"

CHECKPOINT_FORMAT = 1
"""The number in every checkpoint. It goes up by one when older checkpoints need a change to be read by new code: a
renamed config field, another layout of the state."""

MIGRATIONS: dict[int, Callable[[dict], dict]] = {}
"""`MIGRATIONS[n]` turns the meta dictionary (config, versions) of a checkpoint of format n into one of format n + 1."""


def migrate(meta: dict) -> dict:
    """The meta dictionary of a checkpoint in today's format, by one migration after another.

    Raises ValueError, in words that follow "the checkpoint", for one that is not ours, newer, or too old to be read.
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
    """Clipping was once turned off by infinity, which no JSON file of a result can hold; it is None."""
    config = meta.get("config")
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    if not isinstance(optimizer, dict) or optimizer.get("clip_norm") != math.inf:
        return meta
    return {**meta, "config": {**config, "optimizer": {**optimizer, "clip_norm": None}}}  # type: ignore[dict-item]
