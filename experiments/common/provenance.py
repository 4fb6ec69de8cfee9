"""Provenance of a result besides its config: versions, command, hardware."""

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path

import jax

from seqboat.version import __version__

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that affect results."""
    found = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"seqboat": __version__, "python": platform.python_version(), **found}


def command() -> str:
    """The command line, without flags that name paths on this machine."""
    words = re.sub(r"\0(--workdir|--config\.data_dir)[=\0][^\0]*", "", "\0" + "\0".join(sys.argv[1:]))
    kept = words.split("\0")[1:]
    return f"python -m experiments.{Path(sys.argv[0]).stem} {shlex.join(kept)}"


def hardware() -> str:
    """Devices and CPU, for timings."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}"
