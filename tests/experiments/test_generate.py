"""Generation: what is drawn, from which state, and what a terminal is shown; and the program's mistakes in one line."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_programs import Done, assert_one_line, run_all

from configs.lm import bytes as recipe
from configs.synthetic import recall
from experiments.common.errors import UserError
from experiments.evaluation.sampling import Sampling, Terminal, generate
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.restore import load_language_model
from tests.helpers import SMALL_MODEL

SMALL = {
    "task.files": ("text.txt",),
    "task.length": 32,
    "task.context": 16,
    **SMALL_MODEL,
    "train.steps": 0,
    "train.batch_size": 2,
    "train.tensorboard": False,
}
PROMPT = bytes(range(256)) * 2 + b"the end"  # every byte, and more than a piece


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained) -> Path:
    """Untrained models, that of "ours" with its data taken away."""
    tmp = tmp_path_factory.mktemp("generate")
    text = tmp / "text.txt"
    text.write_bytes(b"A text of no more than a few bytes. " * 20)
    for name, changes in {
        "credit_router": {},
        "paper": {"model.ssm_truncation": 5},
        "full": {"model.window_size": None},
    }.items():
        config = recipe.get_config("credit_router,tiny")
        config.update_from_flattened_dict({**SMALL, "task.files": (str(text),), **changes})
        train(build(config.to_dict()), tmp / name)
    text.unlink()
    config = recall.get_config()
    config.update_from_flattened_dict({"train.steps": 0, "train.tensorboard": False})
    train(build(config.to_dict()), tmp / "recall")
    (tmp / "classifier").symlink_to(trained)
    return tmp


@pytest.fixture(scope="module")
def ours(folder) -> tuple[Any, dict, int]:
    return load_language_model(folder / "ours")


def sample(ours, prompt, batch=1, count=6, **settings):
    model, variables, _ = ours
    return np.stack(list(generate(model, variables, prompt, Sampling(**settings), batch=batch, count=count)), 1)


def test_the_likeliest_bytes_are_those_of_the_parallel_form(ours):
    """Every byte generated, given the prompt and those before it, however the prompt was cut."""
    model, variables, step = ours
    assert step == 0
    (drawn,) = sample(ours, PROMPT, temperature=0.0)
    ids = np.frombuffer(PROMPT + drawn.tobytes(), np.uint8).astype(np.int32) + 1
    logits = np.array(jax.jit(model.apply)(variables, jnp.asarray(ids[None]), jnp.array([len(ids)])).logits[0])
    logits[:, 0] = -np.inf
    assert drawn.tolist() == (logits[len(PROMPT) - 1 : -1].argmax(1) - 1).tolist()


def test_a_step_and_the_reading_of_the_prompt_are_compiled_once(ours, monkeypatch):
    """What a checkpoint holds has its place, what is made here has none: to jax these are two kinds."""
    compiled = []

    def jit(fn, **settings):
        compiled.append(jax_jit(fn, **settings))
        return compiled[-1]

    jax_jit = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    sample(ours, PROMPT * 2, batch=2, count=4)
    assert {program.__name__: program._cache_size() for program in compiled} == {"read": 1, "separate": 1, "step": 1}


def test_samples_are_a_function_of_seed_prompt_and_settings(ours):
    """The first of a batch is what it is alone; others, and other seeds, differ."""
    alone = sample(ours, b"A", count=30)
    several = sample(ours, b"A", batch=3, count=30)
    np.testing.assert_array_equal(several[:1], alone)
    assert len({row.tobytes() for row in several}) == 3
    assert (sample(ours, b"A", seed=1, count=30) != alone).any()


LOGITS = jnp.log(jnp.array([[0.5, 0.05, 0.2, 0.1, 0.1, 0.05]]))


def drawn(**settings):
    draw = jax.jit(jax.vmap(lambda number: Sampling(**settings).draw(LOGITS, number)[0]))
    return np.bincount(np.asarray(draw(jnp.arange(4000))), minlength=6) / 4000


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 0.1, 0.4, 0.2, 0.2, 0.1]),
        ({"temperature": 0.5}, [0, 0.25, 4, 1, 1, 0.25]),
        ({"temperature": 0.0}, [0, 0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 0, 1, 0, 0, 0]),
        ({"top_k": 3}, [0, 0, 2, 1, 1, 0]),
        ({"top_k": 99}, [0, 0.1, 0.4, 0.2, 0.2, 0.1]),
        ({"top_p": 0.39}, [0, 0, 1, 0, 0, 0]),
        ({"top_p": 0.75}, [0, 0, 2, 1, 1, 0]),
        ({"top_k": 3, "top_p": 0.45}, [0, 0, 1, 0, 0, 0]),
        ({"top_p": 1e-40}, [0, 0, 1, 0, 0, 0]),
        ({"temperature": 1e-30}, [0, 0, 1, 0, 0, 0]),
        ({"temperature": 1e30}, [0, 1, 1, 1, 1, 1]),
        ({"seed": 3}, [0, 0.1, 0.4, 0.2, 0.2, 0.1]),
    ],
)
def test_symbols_are_drawn_with_their_probabilities(settings, expected):
    """4000 draws: five deviations of a share of a half are 0.04. The padding, the likeliest here, never."""
    expected = np.array(expected) / np.sum(expected)
    found = drawn(**settings)
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, atol=0.04)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\n\ttext", "plain\n\ttext"),
        ("naïve €".encode(), "naïve €"),
        (b"\xff\xe2\x82 cut \xe2\x82", "�� cut �"),
        (b"\x1b[2J\x07\r\x00", "�[2J���"),
    ],
)
def test_a_terminal_is_shown_nothing_that_it_would_obey(data, text):
    terminal = Terminal()
    assert "".join(terminal.text(data[i : i + 1]) for i in range(len(data))) + terminal.text(b"", final=True) == text
    assert Terminal().text(data, final=True) == text


# The program

ASKED = ["--workdir={tmp}/ours", "--prompt=The ", "--bytes=20"]
REFUSED: dict[str, tuple[list[str], str]] = {
    "no workdir": (["--prompt=a"], "--workdir=DIR is missing"),
    "missing workdir": (["--workdir={tmp}/nothing", "--prompt=a"], "there is no work directory {tmp}/nothing"),
    "no checkpoint": (["--workdir={tmp}", "--prompt=a"], "there is no checkpoint directory {tmp}/checkpoints"),
    "empty prompt": (ASKED[:1], "--prompt is empty: the first byte that is generated needs one before it"),
    "classifier": (["--workdir={tmp}/classifier", "--prompt=a"], "holds a Classifier: this needs a language model"),
    "no bytes": (["--workdir={tmp}/recall", "--prompt=a"], "symbols are no bytes: a prompt needs a model of bytes"),
    "cut kernel": (
        ["--workdir={tmp}/paper", "--prompt=a"],
        "this model cannot generate: ssm_truncation=5 cannot be streamed: a cut kernel has no state to go on from; "
        "train with None, as the variant :credit_router of a recipe does",
    ),
    "no window": (["--workdir={tmp}/full", "--prompt=a"], "window_size=None cannot be streamed"),
    "temperature": ([*ASKED, "--temperature=-1"], "--temperature=-1.0: must be 0, or in 1e-30..1e+30"),
    "temperature NaN": ([*ASKED, "--temperature=nan"], "--temperature=nan: must be a finite number"),
    "top_k": ([*ASKED, "--top_k=0"], "--top_k=0: must be at least 1"),
    "top_p 0": ([*ASKED, "--top_p=0"], "--top_p=0.0: must be above 0 and at most 1"),
    "top_p 2": ([*ASKED, "--top_p=2"], "--top_p=2.0: must be above 0 and at most 1"),
    "seed": ([*ASKED, "--seed=-1"], "--seed=-1: must be in 0..4294967295"),
    "bytes": ([*ASKED, "--bytes=0"], "--bytes=0"),
    "batch": ([*ASKED, "--batch=0"], "--batch=0"),
    "step": ([*ASKED, "--step=7"], "there is no checkpoint of step 7 in {tmp}/ours/checkpoints"),
}
DONE = {"one": ASKED, "again": ASKED, "three": [*ASKED, "--batch=3"]}


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Done]:
    cases = {**{name: arguments for name, (arguments, _) in REFUSED.items()}, **DONE}
    commands = [
        ("experiments.generate", [a.format(tmp=folder) for a in arguments], None) for arguments in cases.values()
    ]
    return dict(zip(cases, run_all(commands), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_line(results, folder, name):
    done = results[name]
    assert REFUSED[name][1].format(tmp=folder) in assert_one_line(done)
    assert done.out == ""


def test_the_program_prints_what_is_generated(results, ours):
    one, three = results["one"], results["three"]
    assert (one.code, three.code) == (0, 0)
    assert one.out == results["again"].out
    rows = sample(ours, b"The ", batch=3, count=20)
    texts = [Terminal().text(b"The " + row.tobytes(), final=True) for row in rows]
    assert one.out == texts[0] + "\n"
    assert three.out == "".join(f"{'-' * 80}\n{text}\n" for text in texts)
    assert "bytes a second" in one.err


def test_refusals_come_before_the_first_byte_is_asked_for(ours):
    model, variables, _ = ours
    with pytest.raises(UserError, match="--prompt is empty"):
        generate(model, variables, b"", Sampling(), batch=1, count=1)
