"""What is read of a command line: None, names and the order of overrides; flags that mean nothing; the cache."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from tests.helpers import grid

REPOSITORY = Path(__file__).parents[2]
QUICK, ROTATION = "--config=configs/quickstart.py", "configs/hyper/rotation.py"


def field(values, path):
    for name in path.split("."):
        values = values[name]
    return values


@pytest.mark.parametrize(
    ("path", "word", "value"),
    [
        ("model.window_size", "8", 8),
        ("optimizer.clip_norm", "0.5", 0.5),
        ("data_dir", "folder", "folder"),
        ("hypernetwork.at", "(0.5,)", (0.5,)),
        ("task.name", "digits", "digits"),
        ("model.causal", "True", True),  # is refused later, as a name of None is
    ],
)
def test_none_holds_where_it_stands(typed, path, word, value):
    config = f"--config={ROTATION}" if path.startswith(("hypernetwork", "task")) else QUICK
    nothing, something = f"--config.{path}=None", f"--config.{path}={word}"
    assert field(typed(config, nothing), path) is None
    assert field(typed(config, nothing, something), path) == value
    assert field(typed(config, something, nothing), path) is None
    assert field(typed(config, nothing, something, nothing, something), path) == value
    if path != "model.causal":  # a switch takes no second word
        assert field(typed(config, something, f"--config.{path}", "None"), path) is None
        assert field(typed(config, nothing, f"--config.{path}", word), path) == value


def test_a_group_may_be_none(typed):
    assert typed(f"--config={ROTATION}", "--config.hypernetwork=None")["hypernetwork"] is None
    assert typed(QUICK, "--config.train={'steps': 3}", "--config.train.steps=4")["train"] == {"steps": 4}


def test_words_of_a_tuple_are_collected(typed):
    words = [f"--config.model.hidden={width}" for width in (4, 5)]
    assert typed(f"--config={ROTATION}", *words)["model"]["hidden"] == (4, 5)
    assert typed(f"--config={ROTATION}", words[0], "--config.model.hidden=None", words[1])["model"]["hidden"] == (5,)


@pytest.mark.parametrize("switch", ["--noconfig.model.causal", "--config.model.causal=false"])
def test_switches(typed, switch):
    assert typed(QUICK, switch)["model"]["causal"] is False
    assert typed(QUICK, switch, "--config.model.causal")["model"]["causal"] is True


@pytest.mark.parametrize("default", [1, 0.5, True, "text", (1, 2)])
def test_any_field_may_be_named_like_a_method(typed, tmp_path, default):
    names = [name for name in dir(ConfigDict) if not name.startswith("_")]
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    config, names = ConfigDict({{'group': {{}}}}), {names}\n"
        f"    for name in names:\n        config.group[name] = {default!r}\n    return config\n"
    )
    new = {int: 2, float: 2.0, bool: False, str: "other", tuple: (3,)}[type(default)]
    values = typed(f"--config={tmp_path}/config.py", *(f"--config.group.{name}={new}" for name in names))
    assert values == {"group": dict.fromkeys(names, new)}
    assert len(names) > 10


CONFIGS = {
    "exits.py": ("raise SystemExit(3)", "the config file ended the program, with status 3"),
    "exits_later.py": ("import sys\n\n\ndef get_config():\n    sys.exit()", "the config file ended the program"),
    "none.py": ("def get_config():\n    pass", "get_config() returned None: does it end with `return config`?"),
    "number.py": ("def get_config():\n    return 3", "--config: "),
    "endless.py": ("def get_config():\n    return get_config()", "maximum recursion depth exceeded"),
    "itself.py": ("from itself import get_config", "itself"),
    "bytes.py": (b"name = '\xff'\n", "utf-8"),
    "nul.py": (b"a = 1\0\n", "null"),
    "plain.py:tiny": ("def get_config():\n    return {}", "this config file has no variants"),
    "escapes.py": ("raise ValueError('\\x1b[31m')", "[31m"),
}


@pytest.mark.filterwarnings("ignore:.*get_config")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_file_is_a_program_that_may_do_anything(typed, tmp_path, monkeypatch, name):
    text, message = CONFIGS[name]
    (tmp_path / name.partition(":")[0]).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        typed(f"--config={tmp_path / name}")
    assert message in str(caught.value)
    assert "Traceback" not in cli.one_line(str(caught.value))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--rate=nan", "--rate=nan: must be a finite number"),
        ("--rate=-inf", "--rate=-inf: must be a finite number"),
        ("--count=4294967296", "--count=4294967296: must be at most 4294967295"),
        ("--count=-99999999999", "--count=-99999999999: must be at most 4294967295"),
        ("--names=a,\udcff", "--names=\udcff: must be UTF-8"),
        ("--name=\udcff", "--name=\udcff: must be UTF-8"),
        ("--count=4294967295", None),
        ("--text=\udcff", None),
        ("--switch", None),
    ],
)
def test_flags_that_mean_nothing(monkeypatch, word, message):
    flags = cli.flags.FlagValues()
    monkeypatch.setattr(cli.flags, "FLAGS", flags)
    cli.flags.DEFINE_float("rate", 0.5, "", flag_values=flags)
    cli.flags.DEFINE_integer("count", 1, "", flag_values=flags)
    cli.flags.DEFINE_list("names", [], "", flag_values=flags)
    cli.flags.DEFINE_string("name", None, "", flag_values=flags)
    cli.flags.DEFINE_bool("switch", False, "", flag_values=flags)
    cli.flags.DEFINE(cli._Bytes(), "text", "", "", flag_values=flags)
    if message is None:
        cli._parse(["program", word])
        assert flags["text"].value == (b"\xff" if "text" in word else b"")
        return
    with pytest.raises(UserError) as caught:
        cli._parse(["program", word])
    assert str(caught.value) == message


def test_an_error_is_one_line_that_can_be_read():
    assert cli.one_line("a\n  b\r\n\x1d c") == "a b c"
    line = cli.one_line("x=" + "9" * 5000 + ": must be less")
    assert len(line) < 1100
    assert line.startswith("x=999")
    assert line.endswith("9: must be less")


def test_without_a_home_nothing_is_kept(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    updates = {}
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    with warnings.catch_warnings():
        runtime.use_compilation_cache()
    assert "jax_compilation_cache_dir" not in updates
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    with warnings.catch_warnings():
        runtime.use_compilation_cache()
    assert updates["jax_compilation_cache_dir"].startswith("/somewhere/seqboat/compiled/")


# In a process of its own, as the cache is jax's and of the whole process.
TORN = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from absl import app
from experiments.common import cli, runtime

def main():
    runtime.SHORTEST_CACHED_COMPILATION = 0
    runtime.use_compilation_cache()
    compute = jax.jit(lambda x: jnp.sin(x) @ x)
    other = jax.jit(lambda x: jnp.cos(x) + 1)
    entries = lambda: {path: path.read_bytes() for path in Path(sys.argv[1].removeprefix("--cache=")).glob("*-cache")}
    for _ in range(2):
        jax.block_until_ready([compute(jnp.ones((3, 3))), other(jnp.ones(3))])
        whole = entries()
        assert len(whole) >= 2
        for path, data in whole.items():
            path.write_bytes(data[: len(data) // 2])
        jax.clear_caches()
    jax.block_until_ready([compute(jnp.ones((3, 3))), other(jnp.ones(3))])
    assert all(len(entries()[path]) > 0.9 * len(data) for path, data in whole.items())

cli.flags.DEFINE_string("cache", None, "")
if __name__ == "__main__":
    cli.run(main)
"""


@pytest.mark.breadth  # test_without_a_home_nothing_is_kept: the cache
def test_a_torn_entry_of_the_cache_is_replaced_and_said_once(tmp_path):
    (tmp_path / "program.py").write_text(TORN)
    cache = tmp_path / "cache"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {
        **kept,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", f"--cache={cache}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"a compiled program in {cache} could not be read: compiling it again" in line


@pytest.mark.breadth  # test_terminal.py, test_programs.py: programs
@pytest.mark.parametrize("word", grid(("--help", "--helpshort", "-helpfull", "-?"), "--help"))
def test_help_is_not_a_failure(tmp_path, word):
    (tmp_path / "program.py").write_text(
        '"""What it does."""\nfrom experiments.common import cli\n\ncli.run(lambda: None)\n'
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", word],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "What it does." in done.stdout
