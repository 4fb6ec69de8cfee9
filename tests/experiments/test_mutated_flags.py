"""Command lines that nobody should type: each gives an experiment, or one line that says what is wrong.

SEQBOAT_FUZZ_SEED draws others.
"""

import json
import os
import random
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from experiments.common import cli
from experiments.common.errors import UserError
from experiments.common.terminal import printable
from experiments.training.experiment import build

SEED = int(os.environ.get("SEQBOAT_FUZZ_SEED", "0"))
COUNT = 150

SIZES = ("layers=1", "features=8", "key_size=4", "value_size=8", "mixer.state_size=2", "window_size=4", "block_size=8")
MODEL = [f"--config.model.{size}" for size in SIZES]
LISTOPS = [f"--config.task.{split}_examples=20" for split in ("train", "validation", "test")]
SLOTS = [f"--config.task.{split}_examples=20" for split in ("train", "test")]
BYTES = ["--config.task.files=('{folder}/text',)", "--config.task.length=16", "--config.task.context=4"]
RECIPES = {
    "configs/quickstart.py": [*LISTOPS, *MODEL],
    "configs/quickstart.py:credit_router,full": [*LISTOPS, *MODEL],
    "configs/synthetic/mqar.py": [*SLOTS, *MODEL],
    "configs/synthetic/selective_copy.py:credit_router": [*SLOTS, *MODEL],
    "configs/hyper/pareto_copy.py": [*SLOTS, *MODEL, "--config.hypernetwork.network.hidden=(4,)"],
    "configs/lm/bytes.py:credit_router,tiny": [*BYTES, *MODEL],
}
# No number that is a size, and too large to be made here, is accepted by mistake: all of them are refused as such.
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "1",
    "2",
    "7",
    "0.5",
    "-0.0",
    "1e-320",
    "1e39",
    "2147483648",
    "-1e10",
]
NUMBERS += ["10000000000", "-10000000000", "18446744073709551616", "9" * 400, "9" * 5000, "0x7f", "1_000", "1e3"]
WORDS = [
    "None",
    "none",
    "",
    " ",
    "abc",
    "True",
    "False",
    "true",
    "é文",
    "\x1b[31mred",
    "a\nb",
    "\udcff",
    "\u202e",
    "~",
    "/",
]
WORDS += [
    "gs://bucket/x",
    "x" * 5000,
    "..",
    "%s",
    "{0}",
    "data",
    "pmap",
    "fsdp=4,fsdp_hidden=2",
    "softmax",
    "mlp",
    "=",
    "--",
]
TUPLES = ["()", "(1,)", "(1, 2)", "('a', 1)", "(('a', 1),)", "(('a', nan),)", "(('*', 1),)", "((1, 2), 3)", "(None,)"]
TUPLES += [
    "[1, 2]",
    "{}",
    "{'steps': 3}",
    "{'a': {}}",
    "(1e400,)",
    "('a', 'b')",
    "(",
    "((((",
    "(-1, 0, 2)",
    "lambda: 0",
]
NAMES = [
    "keys",
    "items",
    "get",
    "update",
    "copy",
    "lock",
    "to_json",
    "__class__",
    "_fields",
    "x y",
    "é",
    "a.b",
    "",
    "0",
    "[0]",
]


def leaves(values: Mapping[str, Any], where: str = "config") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield f"{where}.{name}", value
        if isinstance(value, Mapping):
            yield from leaves(value, f"{where}.{name}")


def pool(value: Any, rng: random.Random) -> list[str]:
    """Words like a field's value, most often."""
    if rng.random() < 0.2:
        return rng.choice((NUMBERS, WORDS, TUPLES))
    if isinstance(value, str | bool | None):
        return WORDS
    return TUPLES if isinstance(value, tuple | Mapping) else NUMBERS


def mutated(rng: random.Random, fields: list[tuple[str, Any]]) -> list[str]:
    """One to three words, most of them of the form of an override."""
    words: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name, old = rng.choice(fields)
        if rng.random() < 0.1:
            name = f"{rng.choice((name, name.rpartition('.')[0]))}.{rng.choice(NAMES)}"
        if rng.random() < 0.05:
            name = name[:-1] + rng.choice("sx_é\x1b")
        value = rng.choice(pool(old, rng))
        form = rng.random()
        if form < 0.75:
            words.append(f"--{name}={value}")
        elif form < 0.85:
            words += [f"--{name}", value]
        else:
            words.append(rng.choice((f"--no{name}", f"--{name}", f"-{name}={value}", f"--{name}={name}", value)))
        if rng.random() < 0.15:
            words.append(f"--{name}={rng.choice(['None', *pool(old, rng)])}")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_mutated_flags(typed, tmp_path, part):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    rng = random.Random(SEED * 5 + part)
    faults, accepted = [], 0
    fields = {recipe: list(leaves(typed(f"--config={recipe}"))) for recipe in RECIPES}
    for _ in range(COUNT // 5):
        recipe = rng.choice(list(RECIPES))
        words = [f"--config={recipe}", *(word.format(folder=tmp_path) for word in RECIPES[recipe])]
        words += mutated(rng, fields[recipe])
        try:
            values = typed(*words)
            built = build(values)
            json.dumps(built.values, allow_nan=False)
            accepted += 1
        except UserError as error:
            text = printable(cli.one_line(str(error)))
            if "Traceback" in text or not text or "\n" in text:
                faults.append(f"{words}\n{text}")
        except BaseException:
            faults.append(f"{words}\n{traceback.format_exc()[-1500:]}")
    assert not faults, f"{len(faults)} with SEQBOAT_FUZZ_SEED={SEED}:\n" + "\n\n".join(faults)
    assert accepted < COUNT // 5, "mutations do something"
