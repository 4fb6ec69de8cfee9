"""Provenance of a result besides its config: versions, command, hardware."""

import functools
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


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the libraries that affect results, `more` among them, as far as they are installed."""
    found = {name: _version(name) for name in (*VERSIONED, *more)}
    installed = {name: version for name, version in found.items() if version is not None}
    return {"seqboat": __version__, "python": platform.python_version(), **installed}


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def command() -> str:
    """The command line of a program or an example, without flags that name paths on this machine."""
    words = re.sub(r"\0(--workdir|--config\.data_dir)[=\0][^\0]*", "", "\0" + "\0".join(sys.argv[1:]))
    kept = words.split("\0")[1:]
    program = Path(sys.argv[0])
    folder = "examples" if program.parent.name == "examples" else "experiments"
    return f"python -m {folder}.{program.stem} {shlex.join(kept)}".rstrip()


def hardware() -> str:
    """Devices and CPU, for timings."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}"
