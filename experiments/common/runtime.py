"""The process: memory that is kept, compiled programs that are cached."""

import ctypes
import functools
import hashlib
import inspect
import os
import platform
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging

# Compilations shorter than this are not worth a file.
SHORTEST_CACHED_COMPILATION = 0.5


def keep_memory() -> None:
    """Let the C library keep what a step frees for the next one, instead of giving it back page by page.

    On a CPU every step's buffers are else mapped anew, and the faults take up to a third of its time
    (docs/performance.md). Costs nothing but that a program keeps its peak. Only glibc has these switches.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        tune = library.mallopt
    except (OSError, AttributeError):
        return
    for switch, value in _MALLOC.values():
        tune(switch, value)


# glibc's malloc.h: name -> (number, value).
_MALLOC = {
    "M_ARENA_MAX": (-8, 1),  # one heap for all threads: the others' are too small for a buffer
    "M_MMAP_MAX": (-4, 0),  # no buffer of its own mapping
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}


def use_compilation_cache() -> None:
    """Keep compiled programs in ~/.cache/seqboat, apart for every kind of processor. JAX_COMPILATION_CACHE_DIR wins.

    Without a home nothing is kept. What cannot be read again, cut short by a kill or a full disk, is removed, and so
    written anew.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with suppress(RuntimeError):  # no home
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            jax.config.update("jax_compilation_cache_dir", str(root / "seqboat" / "compiled" / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_CACHED_COMPILATION)
    warnings.filterwarnings("always", message=_UNREADABLE)
    warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)


_UNREADABLE = "Error reading persistent compilation cache entry"


def _show_warning(show: Callable[..., None], message: Any, *rest: Any, **named: Any) -> None:
    """jax warns of an entry that it cannot read, compiles, and leaves the entry as it is, for every later start."""
    if not str(message).startswith(_UNREADABLE):
        show(message, *rest, **named)
        return
    frame = inspect.currentframe()
    while frame is not None and "cache_key" not in frame.f_locals:  # its name is not in the message
        frame = frame.f_back
    key = frame.f_locals["cache_key"] if frame else ""
    entry = Path(getattr(jax.config, "jax_compilation_cache_dir", None) or "") / f"{key}-cache"
    with suppress(OSError):
        entry.unlink()
        _say_unreadable(entry.parent)


@functools.cache  # once for all of them
def _say_unreadable(directory: Path) -> None:
    absl_logging.warning("a compiled program in %s could not be read: compiling it again", directory)


def _processor() -> str:
    """A name for this kind of processor: code compiled for one may use instructions that another lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags_line = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags_line.encode()).hexdigest()[:12]}"
