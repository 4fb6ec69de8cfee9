"""Settings of the process: memory retention and the compilation cache."""

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

# Seconds; faster compilations are not cached.
SHORTEST_CACHED_COMPILATION = 0.5


def keep_memory() -> None:
    """Let the C library keep memory freed by a step for the next one, instead of returning it to the system.

    Otherwise every step on a CPU maps its buffers anew, and the page faults take up to a third of its time
    (docs/performance.md). The only cost is that a program stays at its peak memory. glibc only.
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
    "M_ARENA_MAX": (-8, 1),  # one heap for all threads: per-thread heaps are too small for a buffer
    "M_MMAP_MAX": (-4, 0),  # no separate mapping for large buffers
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}


def use_compilation_cache() -> None:
    """Cache compiled programs in ~/.cache/seqboat, separately per kind of processor. JAX_COMPILATION_CACHE_DIR wins.

    Without a home directory there is no cache. Entries that cannot be read, truncated by a kill or a full disk, are
    removed and so rewritten.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with suppress(RuntimeError):  # no home directory
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            jax.config.update("jax_compilation_cache_dir", str(root / "seqboat" / "compiled" / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_CACHED_COMPILATION)
    warnings.filterwarnings("always", message=_UNREADABLE)
    warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)


_UNREADABLE = "Error reading persistent compilation cache entry"


def _show_warning(show: Callable[..., None], message: Any, *rest: Any, **named: Any) -> None:
    """Removes unreadable entries: jax warns about one, recompiles, and leaves it in place for every later start."""
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


@functools.cache  # warn once, not per entry
def _say_unreadable(directory: Path) -> None:
    absl_logging.warning("a compiled program in %s could not be read: compiling it again", directory)


def _processor() -> str:
    """A name for this kind of processor, since code compiled for one may use instructions that another lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags_line = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags_line.encode()).hexdigest()[:12]}"
