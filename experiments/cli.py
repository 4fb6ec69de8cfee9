"""What every program does around its own work: flags in, one-line errors out."""

import ctypes
import hashlib
import logging
import os
import platform
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from experiments.errors import UserError

_NONE = re.compile(r"--config\.([\w.]+)=None")
# Compilations shorter than this are not worth a file.
SHORTEST_CACHED_COMPILATION = 0.5


def run(main: Callable[[], None]) -> None:
    """Parse the flags and call `main`; print an error made by the user in one line and exit with 2."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.use_absl_handler()
    logging.getLogger("jax").setLevel(logging.ERROR)
    # A save that fails on a full disk is one line of ours; what jax, asyncio and tensorstore add to it is noise.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        app.run(lambda _: _call(main), flags_parser=_parse)
    except UserError as error:
        _fail(str(error))


def _unraisable(event: Any) -> None:
    """Drops what tensorstore reports of a failed save to an event loop that is gone."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _call(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError as error:
        _fail(f"not enough memory: {error}")
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        _fail(f"not enough memory for so large a batch, sequence or model: {str(error).splitlines()[0]}")
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))


def _parse(argv: list[str]) -> list[str]:
    # ml_collections reads no None where a config has a number or a text.
    nothing = dict.fromkeys(found[1] for word in argv if "config" in flags.FLAGS and (found := _NONE.fullmatch(word)))
    try:
        rest = flags.FLAGS([word for word in argv if not (nothing and _NONE.fullmatch(word))])
        if nothing and flags.FLAGS["config"].value is not None:
            flags.FLAGS["config"].value.update_from_flattened_dict(nothing)
    except Exception as error:  # a config file is a program, and runs here
        raise UserError(_one_line(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def read_config(flag: flags.FlagHolder) -> dict[str, Any]:
    """The values of a config file and its overrides."""
    if flag.value is None:
        raise UserError(f"--{flag.name}=FILE is missing: for instance --{flag.name}=configs/quickstart.py")
    try:
        return flag.value.to_dict()
    except Exception as error:  # ml_collections keeps the error of a file that is not there for the first access
        raise UserError(f"--{flag.name}: {_one_line(error)}") from error


def define_hyper_input() -> flags.FlagHolder:
    return flags.DEFINE_list(
        "at", None, "The hyper-input, where a hypernetwork generates the parameters: 0.5, or 0.1,0.7."
    )


def hyper_input(flag: flags.FlagHolder) -> tuple[float, ...] | None:
    """The numbers of --at."""
    if flag.value is None:
        return None
    try:
        return tuple(map(float, flag.value))
    except ValueError as error:
        raise UserError(f"--at={','.join(flag.value)}: expected a number, or several with commas") from error


def _one_line(error: BaseException) -> str:
    """What went wrong, without the trace that a config file's own error carries."""
    while error.args and isinstance(error.args[0], BaseException):  # ml_collections wraps a KeyError
        error = error.args[0]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.replace("module 'config_config'", "the config file")  # the name ml_collections loads it by
    if missing := re.search(r"No such file or directory: '(.*?)'", text):
        return f"there is no file {missing[1]}"
    if unknown := re.fullmatch(r"'?(\w+)'?(?:\s*Did you mean \"(\w+)\".*)?", text):
        return f"unknown field {unknown[1]!r} in the config" + (f"; did you mean {unknown[2]!r}?" if unknown[2] else "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = next((line for line in reversed(lines) if re.match(r"\w*(Error|Exception): ", line)), None)
    return raised or " ".join(lines) or traceback.format_exception_only(error)[-1].strip()


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


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
    """Keep compiled programs in ~/.cache/seqboat, apart for every kind of processor. JAX_COMPILATION_CACHE_DIR wins."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "seqboat" / "compiled" / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_CACHED_COMPILATION)


def _processor() -> str:
    """A name for this kind of processor: code compiled for one may use instructions that another lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags_line = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags_line.encode()).hexdigest()[:12]}"
