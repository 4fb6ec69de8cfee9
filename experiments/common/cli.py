"""The command line of every program: flags in, one-line errors out."""

import ast
import logging
import math
import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import jax
from absl import app, flags
from absl import logging as absl_logging

from experiments.common import terminal
from experiments.common.errors import Stopped, UserError

# The largest integer of a flag: that of a seed.
MAX_INTEGER = 2**32 - 1
# Characters in the line of an error.
MAX_LINE = 1000
# Flags defined here count as those of the program that defines them, so that its --help shows them.
flags.disclaim_key_flags()
_HELP = ("help", "helpfull", "helpshort", "helpxml", "?")


def run(main: Callable[[], None], *, output_is_needed: bool = False) -> None:
    """Parse the flags and call `main`; print a user error in one line and exit with 2.

    The exit status reports on the files written: a program continues if standard output is closed, unless
    `output_is_needed` because its output is all it produces (`terminal.Output`).
    """
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.use_absl_handler()  # before standard error is wrapped: it searches for handlers of the original
    terminal.guard(output_is_needed)
    absl_logging.get_absl_handler().python_handler.setStream(sys.stderr)
    logging.getLogger("jax").setLevel(logging.ERROR)
    # A save that fails on a full disk is reported by our own line; what jax, asyncio and tensorstore add is noise.
    warnings.filterwarnings("ignore", message="Error writing persistent compilation cache")
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        app.run(lambda _: _call(main), flags_parser=_parse)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
    finally:
        with suppress(UserError, SystemExit):  # otherwise Python flushes, and reports a failure as an exception
            sys.stdout.flush()


def console_script() -> None:
    """What the command `seqboat-NAME` of an installed package does: `python -m experiments.NAME`."""
    name = Path(sys.argv[0]).stem.removeprefix("seqboat-")
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


def _unraisable(event: Any) -> None:
    """Drops tensorstore's reports of a failed save to a closed event loop."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _call(main: Callable[[], None]) -> None:
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        if jax.process_index() == 0:
            print(stopped)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
    except MemoryError as error:
        _fail(f"not enough memory: {error}")
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        _fail(f"not enough memory for this batch, sequence or model size: {str(error).splitlines()[0]}")
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(_with_packaged_config(argv))
        _read_none_for_tuples()
    except SystemExit as ended:
        if any(word.lstrip("-").partition("=")[0] in _HELP for word in argv[1:] if word.startswith("-")):
            sys.exit(0)  # absl exits with 1 after help
        raise UserError(f"the config file ended the program, with status {ended.code!r}") from ended
    except Exception as error:  # a config file is a program that runs here
        raise UserError(_one_line(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    for name in flags.FLAGS:
        _check_flag(name, flags.FLAGS[name].value)
    return rest


def _check_flag(name: str, value: Any) -> None:
    """Raises UserError for values that no flag accepts; those of the config are checked field by field
    (`config.py`)."""
    if isinstance(value, list | tuple):
        for item in value:
            _check_flag(name, item)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--{name}={value}: must be UTF-8") from error
    elif name.startswith("config.") or isinstance(value, bool):
        return
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name}={value}: must be a finite number")
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise UserError(f"--{name}={value}: must be at most {MAX_INTEGER}")


def _with_packaged_config(argv: list[str]) -> list[str]:
    """The words, with --config=configs/FILE naming the file of the installed package where there is none here."""
    before = ["", *argv]
    return [_packaged(word, "" if before[at] == "--config" else "--config=") for at, word in enumerate(argv)]


def _packaged(word: str, prefix: str) -> str:
    path, colon, variant = word.removeprefix(prefix).partition(":")
    if not word.startswith(f"{prefix}configs/") or os.path.exists(path):
        return word
    package = find_spec("configs")
    folders = package.submodule_search_locations if package else None
    found = [Path(folder).parent / path for folder in folders or ()]
    return next((f"{prefix}{file}{colon}{variant}" for file in found if file.is_file()), word)


class _OrNone(flags.ArgumentParser):
    """Parses None besides what `parser` parses.

    Anything but a string is the config file's own value, or a method of ConfigDict with the field's name, which
    ml_collections mistakes for its value. It passes through, since it is shown only in the flag's help.
    """

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return f"{self._parser.flag_type()} or None"


class _Group(flags.ArgumentParser):
    def parse(self, argument: str) -> Any:
        from ml_collections import ConfigDict

        value = ast.literal_eval(argument)
        if not isinstance(value, dict):
            raise ValueError(
                "expected a group of fields such as {'steps': 100}; or set one field by --config.GROUP.FIELD=100"
            )
        return ConfigDict(value)

    def flag_type(self) -> str:
        return "group"


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE and the overrides --config.GROUP.FIELD=value, of which the last wins."""
    from ml_collections import ConfigDict, config_flags  # late: a program without a config runs without ml_collections

    parsers = {int: flags.IntegerParser, float: flags.FloatParser, bool: flags.BooleanParser, str: flags.ArgumentParser}
    for kind, parser in {**parsers, ConfigDict: _Group}.items():
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser()))
    text = "Experiment to run: a file of configs/, or file.py:variant."
    return config_flags.DEFINE_config_file("config", None, text, flag_values=flags.FLAGS)


def _read_none_for_tuples() -> None:
    """Repeated flags of a tuple accumulate; None clears what came before it, and a final None gives None."""
    if "config" not in flags.FLAGS or flags.FLAGS["config"].value is None:
        return
    given = flags.FLAGS["config"].override_values  # type: ignore[attr-defined]
    nothing = {path: value for path, value in given.items() if isinstance(value, tuple) and None in value}
    for path, value in nothing.items():
        after = value[len(value) - value[::-1].index(None) :]
        flags.FLAGS["config"].value.update_from_flattened_dict({path: after or None})


def read_config(flag: flags.FlagHolder) -> dict[str, Any]:
    """The values of a config file and its overrides."""
    if flag.value is None and flag.present:
        raise UserError(f"--{flag.name}: get_config() returned None: does it end with `return config`?")
    if flag.value is None:
        raise UserError(f"--{flag.name}=FILE is missing: for instance --{flag.name}=configs/quickstart.py")
    try:
        return flag.value.to_dict()
    except Exception as error:  # ml_collections raises for a missing file on first access
        raise UserError(f"--{flag.name}: {_one_line(error)}") from error


class _Bytes(flags.ArgumentParser):
    """A flag whose value is the bytes as typed, valid UTF-8 or not."""

    def parse(self, argument: Any) -> bytes:
        return os.fsencode(argument)

    def flag_type(self) -> str:
        return "bytes"


def define_bytes(name: str, default: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE(_Bytes(), name, default, text)


def define_parameter_dtype() -> flags.FlagHolder:
    from seqboat.quantization import ParameterDtype  # late: it imports Flax, which few programs' flags need

    return flags.DEFINE_enum(
        "parameter_dtype", "float32", get_args(ParameterDtype), "Numbers in which the kernels of dense layers are kept."
    )


def define_hyper_input() -> flags.FlagHolder:
    return flags.DEFINE_list(
        "at", None, "Hyper-input of a hypernetwork that generates the parameters: 0.5, or 0.1,0.7."
    )


def hyper_input(flag: flags.FlagHolder) -> tuple[float, ...] | None:
    """The numbers given by --at."""
    if flag.value is None:
        return None
    try:
        numbers = tuple(map(float, flag.value))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"--at={','.join(flag.value)}: expected one or more finite numbers, separated by commas")
    return numbers


def _one_line(error: BaseException) -> str:
    """The error message, without the traceback that a config file's own error carries."""
    while error.args and isinstance(error.args[0], BaseException):  # ml_collections wraps a KeyError
        error = error.args[0]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.replace("module 'config_config'", "the config file")  # the name ml_collections loads it by
    if missing := re.search(r"No such file or directory: '(.*?)'", text):
        return f"there is no file {missing[1]}"
    if "get_config() takes 0 positional arguments" in text:
        return "this config file has no variants: leave out the colon and what follows it"
    if unknown := re.fullmatch(r"'?(\w+)'?(?:\s*Did you mean \"(\w+)\".*)?", text):
        return f"unknown field {unknown[1]!r} in the config" + (f"; did you mean {unknown[2]!r}?" if unknown[2] else "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = next((line for line in reversed(lines) if re.match(r"\w*(Error|Exception): ", line)), None)
    return raised or " ".join(lines) or traceback.format_exception_only(error)[-1].strip()


def _fail(message: str) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


def one_line(message: str) -> str:
    """The message as one line of bounded length, since it may quote text of any length."""
    line = " ".join(message.split())
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"
