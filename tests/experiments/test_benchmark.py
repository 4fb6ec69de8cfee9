"""What the benchmark forces, counts and refuses; that its suites run. How fast anything is, no test says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.lm import enwik8
from experiments.benchmarks import (
    cases,
    codebook,
    contenders,
    decoding,
    kernels,
    language_model,
    memory,
    mixers,
    output,
    suites,
)
from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.settings import Changes, Settings, agree
from experiments.benchmarks.timing import Race, Times, interleave
from experiments.common.errors import UserError
from experiments.pages import performance
from experiments.tasks import corpus
from experiments.training.models import build_model
from experiments.training.optimizers import OptimizerConfig
from seqboat.layers.mixers import ema
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from tests.helpers import grid

ROOT = Path(__file__).parents[2]
SMALL = {
    "text": Case(
        replace(CASES["text"].layer, features=8, key_size=4, value_size=16, window_size=8, block_size=16), 2, 96
    ),
    "lm": Case(replace(CASES["lm"].layer, features=8, key_size=4, value_size=16, window_size=8, block_size=16), 1, 96),
}
SETTINGS = Settings({"text": SMALL["text"]}, (0.25, 1.0), rounds=1, seconds=0.0, transformer=True)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suites, "CASES", SMALL)
    monkeypatch.setattr(suites, "LENGTHS", (64, 128))
    monkeypatch.setattr(suites, "EMA_LENGTHS", (64,))


def test_every_function_is_called_once_a_round_after_one_call_untimed():
    calls = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, seconds=0.0).times
    assert calls[:3] == ["a", "b", "c"]
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(3, 15, 3))
    assert [len(times[name].seconds) for name in "abc"] == [4, 4, 4]
    assert all(time.best <= time.median for time in times.values())


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_the_router_bias_gives_the_rate(rate):
    u = np.random.default_rng(0).standard_normal((4, 1000, 1, 2)).astype(np.float32)
    bias = cases.threshold(u, rate)
    u[..., 1] += bias
    assert (u[..., 1] > u[..., 0]).mean() == pytest.approx(rate, abs=0.003)
    assert abs(bias) < 10  # the confidence still has a gradient


def test_a_bias_for_every_layer_changes_the_second_logit_alone():
    bias = {"configurator": {"logits": {"bias": jnp.zeros((3, 2)), "kernel": jnp.zeros((3, 4, 2))}}}
    changed = cases.with_router_bias(bias, np.array([1.0, 2.0, 3.0]))["configurator"]["logits"]
    assert changed["bias"].tolist() == [[0, 1], [0, 2], [0, 3]]
    assert not changed["kernel"].any()


def test_flops_of_an_active_element():
    """By hand, for D 8, Z 4, E 16, window 8: the projection, the output, scores and values over 17 or 9 keys."""
    forward = lambda keys: 2 * (8 * (4 + 2 * 16) + 16 * 8 + keys * 4 + keys * 16)
    assert cases.active_flops(SMALL["text"]) == 3 * forward(17)
    assert cases.active_flops(SMALL["lm"]) == 3 * forward(9)


def test_a_ratio_has_the_quartiles_of_its_rounds():
    race = Race({"a": Times((2.0, 4.0, 9.0, 8.0, 5.0)), "b": Times((1.0, 1.0, 3.0, 1.0, 1.0))})
    assert race.ratio("slower", "a", "b") == {"slower": 5.0, "slower_quartiles": [3.0, 5.0]}


def test_disagreement_is_that_of_the_worst_leaf():
    """A small leaf counts as much as a large one; relative to the second; equal zeros agree."""
    one, two, large, zero = jnp.array([3.0, 4.0]), jnp.array([3.0, 4.5]), jnp.full(99, 1e6), jnp.zeros(2)
    found = contenders.disagreement(
        (one, {"a": {"small": one}, "b": large, "c": zero}, one),
        (one, {"a": {"small": two}, "b": large, "c": zero}, one),
    )
    assert found == ("d/a/small", pytest.approx(0.5 / np.hypot(3, 4.5)))


def test_results_that_differ_are_not_compared():
    runner = lambda x: contenders.Runner(lambda: None, lambda: (jnp.ones(2), {"a": jnp.ones(3)}, x))
    assert agree("text", runner(jnp.ones(4)), runner(jnp.ones(4)))["difference"] == 0
    for other in (jnp.full(4, 1.01), jnp.full(4, jnp.nan)):
        with pytest.raises(UserError, match=r"text: our dx differs by (1.0e-02|nan) from the reference's"):
            agree("text", runner(other), runner(jnp.ones(4)))
    assert agree("text", runner(jnp.full(4, 1.00005)), runner(jnp.ones(4)))["worst_leaf"] == "dx"


def test_fields_of_the_layer_are_changed_by_name():
    case = Changes(("dtype=bfloat16", "blocks_per_iteration=4", "window_size=None"), batch=3, length=50)(CASES["text"])
    layer = case.layer
    assert (layer.dtype, layer.blocks_per_iteration, layer.window_size, layer.max_positions) == (
        "bfloat16",
        4,
        None,
        50,
    )
    assert (case.batch, case.length, layer.features) == (3, 50, CASES["text"].layer.features)
    assert Changes()(CASES["text"]) == CASES["text"]


def test_the_model_timed_is_that_of_the_recipe():
    recipe = enwik8.get_config()
    model = build_model(recipe.model.to_dict(), corpus.Config("enwik8"))
    assert language_model.make_model(language_model.RECIPE, language_model.DEPTH) == model
    assert OptimizerConfig(**recipe.optimizer.to_dict()) == language_model.OPTIMIZER
    assert (language_model.RECIPE.batch, language_model.RECIPE.length) == (recipe.train.batch_size, recipe.task.length)


@pytest.mark.breadth  # test_a_kernel_that_is_wrong_in_one_gradient_is_refused: an error of one line
def test_a_memory_process_that_fails_is_one_line():
    with pytest.raises(UserError, match=r"memory of sparse on words at 0.5: KeyError: 'words'"):
        memory.measure("words", "sparse", 0.5, None, Changes())


@pytest.mark.breadth  # test_the_other_suites_run
def test_layers_at_the_rates_and_the_forms_beside_them(small, tmp_path):
    rows = list(suites.layers(SETTINGS))
    found = [(row["contender"], row["rate"]) for row in rows]
    forms = ["always active", "no attention", "transformer"]
    assert found == [("sparse", 0.25), ("sparse", 1.0), *((form, None) for form in forms)]
    assert all(row["median_ms"] >= row["best_ms"] > 0 for row in rows)
    output.write(tmp_path / "out", "layers", rows, keep_memory=False)
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["rows"] == rows
    assert {"suite", "command", "hardware", "device_kind", "versions", "keep_memory"} <= set(stored)
    assert {"jax", "jaxlib", "flax"} <= set(stored["versions"])
    output.draw(rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_the_page_is_what_its_files_make():
    docs = ROOT / "docs"
    assert (docs / "performance.md").read_text() == performance.page(docs / "_data/performance"), (
        "run python -m experiments.pages.results"
    )


def test_a_page_shows_milliseconds_of_both_and_their_ratio(tmp_path):
    row = {"case": "text", "rate": 0.5, "best_ms": 1.0}
    ours = {**row, "contender": "sparse", "median_ms": 10.0, "speedup": 4.25, "speedup_quartiles": [4.0, 4.5]}
    rows = [ours, {**row, "contender": "published", "median_ms": 42.5}]
    rows += [{**row, "contender": "no attention", "rate": None, "median_ms": 5.0}]
    output.write(tmp_path / "layers", "layers", rows, keep_memory=True)
    output.write(tmp_path / "ema", "ema", [{"length": 4096, "median_ms": 1234.5}], keep_memory=True)
    (tmp_path / "intro.md").write_text("# Title\n")
    text = performance.page(tmp_path)
    assert text.startswith("# Title\n")
    assert "| layer | rate 0.5 | no attention |" in text
    assert "| text | 42 → 10 (**4.2x**; 4 to 4.5) | 5 |" in text
    assert "| length | median ms |" in text
    assert "| 4,096 | 1234 |" in text


def test_a_page_says_what_ran_on_an_accelerator(tmp_path):
    """Or that nothing did. A part is a line, with its main numbers, and a table of its rows."""
    assert "## Measured on accelerators\n\n**Not run on a GPU or TPU.**" in performance.page(tmp_path)
    row = {"case": "enwik8", "rate": 0.12, "median_ms": 73.1, "tokens_per_second": 896000.0, "worst": [1.0, 2.5]}
    parts = {"environment": {"status": "done", "seconds": 2, "output": ["", "devices: a|b", ""]}}
    parts["language_model"] = {"status": "done", "seconds": 60, "command": "python -m x", "rows": [row]}
    parts["ema"] = {"status": "out of time", "seconds": 60, "output": []}
    for name, ms in {"layers_1": 9.0, "layers_32": 4.0, "layers_pallas": 3.0}.items():
        rows = [{"case": "lm", "contender": "sparse", "rate": rate, "median_ms": rate * ms + 1} for rate in (0.0, 1.0)]
        parts[name] = {"status": "done", "seconds": 9, "command": "python -m x", "rows": rows}
    parts["layers_32"]["rows"] += [{"case": "lm", "contender": "no attention", "rate": None, "median_ms": 1.0}]
    (tmp_path / "accelerators").mkdir()
    path = tmp_path / "accelerators" / "h100.json"
    about = {"device_kind": "NVIDIA H100", "hardware": "1 x NVIDIA H100, 16 CPU cores", "versions": {"jax": "0.11.2"}}
    path.write_text(json.dumps(about | {"parts": parts}))
    text = performance.page(tmp_path)
    assert "### NVIDIA H100\n\n1 x NVIDIA H100, 16 CPU cores; jax 0.11.2; `launch/accelerator.sh`." in text
    assert "| environment | done | 2 | devices: a\\|b |" in text
    assert "| language_model | done | 60 | enwik8 0.12: 73.1 ms, 8.96e+05 tokens per second |" in text
    assert "| ema | out of time | 60 |  |" in text
    assert "| enwik8 | 0.12 | 73.1 | 8.96e+05 | 1 to 2.5 |" in text
    assert "| lm | 0 | 1 | 1 | blocks |" in text
    assert "| lm | 1 | 5 | 4 | pallas |" in text
    assert "Not run" not in text
    path.write_text("[]")
    with pytest.raises(UserError, match=r"h100.json is not a file of launch/accelerator.sh"):
        performance.page(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "layers.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match=r"layers.json is not a file of experiments.benchmark"):
        performance.page(tmp_path)


# test_a_kernel_that_is_wrong_in_one_gradient_is_refused, test_the_other_suites_run
@pytest.mark.breadth
def test_attention_kernels_are_checked_leaf_by_leaf_and_counted():
    """The suite's check refuses what is wrong in one gradient, and useful FLOPs count the pairs that are seen."""
    settings = replace(SETTINGS, cases={"text": replace(SMALL["text"], batch=1, length=32)}, rates=(0.25,))
    rows = list(kernels.attention(settings))
    assert [row["rate"] for row in rows] == [0.25]
    assert all(0 < row[leaf] < 1e-5 for row in rows for leaf in kernels.LEAVES)
    assert all(row["tflops"] > 0 and row["share_of_peak"] > 0 for row in rows)
    window = replace(SMALL["text"].layer, window_size=2)
    for causal, pairs in ((True, 1 + 2 + 3 + 3), (False, 3 + 4 + 4 + 3)):
        case = Case(replace(window, causal=causal, position="rotary"), 1, 9)
        assert kernels.useful_flops(case, np.array([4])) == 6 * pairs * (4 + 16)
    assert kernels.random_rows(SMALL["text"], 0.25).sum() == 48


def test_a_kernel_that_is_wrong_in_one_gradient_is_refused(monkeypatch):
    problem = kernels.Attention.__new__(kernels.Attention)
    ones = [jnp.ones(3)] * 4
    problem.case, problem.inputs, problem.cotangent = SMALL["lm"], (), None
    problem._exact = lambda *_: (ones[0], None, *ones[1:])
    packed = kernels.Packed(None, (), None)
    monkeypatch.setattr(packed, "results", lambda: (ones[0], None, ones[1], 1.01 * ones[2], ones[3]))
    with pytest.raises(
        UserError, match=r"lm: the kernel differs from attend by y 0.0e\+00, dq 0.0e\+00, dk 1.0e-02, dv"
    ):
        problem.check("lm", None, packed)


@pytest.mark.breadth  # test_the_other_suites_run
def test_a_layer_agrees_with_its_dense_form(small):
    rows = list(suites.agreement(replace(SETTINGS, rates=(0.25,))))
    assert [(row["case"], row["rate"]) for row in rows] == [("text", 0.25)]
    assert rows[0]["difference"] < 1e-5


@pytest.mark.breadth  # test_the_other_suites_run: ema_alone
def test_methods_of_the_ema_beside_a_copy(monkeypatch):
    """A method without a form is a row that says so."""
    case = replace(SMALL["lm"], layer=replace(SMALL["lm"].layer, mixer=ema.Config(truncation=32)))

    def refuse(params, data, lags, method, run=kernels.ema_runner):
        if lags and method == "chunked":
            raise ValueError("no such form")
        return run(params, data, lags, method)

    monkeypatch.setattr(kernels, "ema_runner", refuse)
    rows = list(kernels.ema_methods(replace(SETTINGS, cases={"lm": case})))
    assert [(row["method"], row["lags"]) for row in rows] == [
        ("chunked", 32),
        ("fft", 32),
        ("fft", 96),
        ("chunked", 96),
    ]
    assert rows[0]["skipped"] == "no such form"
    assert rows[-1]["difference"] < 1e-5
    assert all(row["over_copy"] > 0 for row in rows[1:])


@pytest.mark.slow  # .ci/run rehearses launch/accelerator.sh, which runs it too
def test_a_training_step_at_forced_rates_and_its_profile(monkeypatch, tmp_path):
    monkeypatch.setattr(language_model, "RECIPE", SMALL["lm"])
    rows = list(language_model.training_step(replace(SETTINGS, depth=2, rates=(0.25, 1.0), profile=tmp_path)))
    assert [row["activation_rate"] for row in rows] == [pytest.approx(0.25, abs=0.05), 1.0]
    assert all(row["tokens_per_second"] == pytest.approx(96e3 / row["median_ms"]) for row in rows)
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.breadth  # test_the_other_suites_run
def test_the_line_through_eleven_rates(small):
    *points, line = suites.sparsity(SETTINGS)
    assert [point["rate"] for point in points] == [i / 10 for i in range(11)]
    fitted = [point["median_ms"] / (1 + point["off_the_line"]) for point in points]
    assert np.diff(fitted) == pytest.approx(line["microseconds_per_active_element"] * 2 * 96 / 10 / 1e3)
    assert fitted[0] == pytest.approx(line["start_ms"])


@pytest.mark.breadth  # test_the_other_suites_run
def test_the_mixers_suite_times_every_mixer_beside_what_others_offer(monkeypatch):
    assert set(mixers.NAMES) == {path.stem for path in (ROOT / "seqboat/layers/mixers").glob("[!_]*.py")}
    monkeypatch.setattr(mixers, "NAMES", ("ema", "gru"))
    monkeypatch.setattr(mixers, "WIDTHS", (16,))
    monkeypatch.setattr(mixers, "_torch", lambda torch, name, data: lambda: None)
    rows = list(mixers.suite(replace(SETTINGS, changes=Changes(batch=2, length=16))))
    offered = {(row["mixer"], row["contender"]) for row in rows}
    ours = {(name, "seqboat") for name in ("ema", "gru", "transformer")}
    assert offered - {("gru", "torch GRU")} == ours | {("gru", "flax GRUCell"), ("transformer", "jax.nn")}
    assert all(row["seqboat_over_it"] > 0 for row in rows if row["contender"] != "seqboat")


@pytest.mark.parametrize("suite", grid(("lengths", "ema_alone", "model", "compilation"), "ema_alone"))
def test_the_other_suites_run(small, suite):
    rows = list(getattr(suites, suite)(SETTINGS))
    if suite == "compilation":
        assert {"seconds_4_layers", "seconds_12_layers"} <= set(*rows)
    else:
        column, values = {
            "lengths": ("length", [64, 128]),
            "ema_alone": ("contender", ["ours"]),
            "model": ("rate", [0.25, 1.0]),
        }[suite]
        assert [row[column] for row in rows] == values


@pytest.mark.breadth  # test_the_other_suites_run, and the parts below
def test_decoding_early_late_and_beside_a_cache(monkeypatch):
    layer = replace(SMALL["lm"].layer, window_size=4)
    model = LanguageModel(LanguageModelConfig(EncoderConfig(layer, 1), 257))
    monkeypatch.setattr(decoding, "models", lambda: {"small": model})
    for name, value in {"EARLY": 3, "MANY": 1, "STREAMED": 5, "LENGTHS": {8: 2}}.items():
        monkeypatch.setattr(decoding, name, value)
    read, *rows = suites.decode(replace(SETTINGS, rates=(0.0, 1.0)))
    assert read["contender"] == "all parameters read once"
    assert read["ms"] > 0
    closed, opened, bfloat16, int8, *cached = rows
    assert (closed["rate"], opened["rate"]) == (0.0, 1.0)
    assert closed["kept_mb"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.initial_state(1))) / 1e6
    for row in (closed, opened):
        assert row["late_over_early"] == pytest.approx(row["late_ms"] / row["ms"])
        assert row["many_per_second"] == pytest.approx(1e3 / row["many_ms"])
    assert (bfloat16["contender"], int8["contender"]) == ("SeqBoat, bfloat16 kernels", "SeqBoat, int8 kernels")
    assert int8["parameter_mb"] < bfloat16["parameter_mb"]
    assert int8["speedup"] == pytest.approx(opened["ms"] / int8["ms"])
    assert [(row["contender"], row["rows"], row["layers_timed"]) for row in cached] == [("transformer", 8, 1)]
    assert all(row["over_ours"] == pytest.approx(row["ms"] / opened["ms"]) for row in cached)


@pytest.mark.breadth  # tests/models/test_coarse_to_fine.py has the samples of two stages
def test_drawing_tokens_of_a_codebook(monkeypatch):
    monkeypatch.setattr(codebook, "SIZES", ((2, 2),))
    monkeypatch.setattr(codebook, "WIDTH", 8)
    rows = list(suites.SUITES["codebook"](replace(SETTINGS, changes=Changes(batch=3, length=2))))
    assert [(row["codes"], row["sequences"], row["contender"]) for row in rows] == [
        (4, 3, arm) for arm in codebook.ARMS
    ]
    two_stages, plain, _ = rows
    assert two_stages["speedup"] == pytest.approx(plain["median_ms"] / two_stages["median_ms"])
    assert "speedup" not in plain
    drawn = codebook.drawing("factored", 2, 2, 3, 2)()
    assert drawn.shape == (3, 2)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 6  # padding, begin, and four codes


def test_a_cache_beyond_the_memory_is_timed_by_fewer_layers(monkeypatch):
    layer = replace(SMALL["lm"].layer, window_size=4)
    model = LanguageModel(LanguageModelConfig(EncoderConfig(layer, 4), 257))
    monkeypatch.setattr(decoding, "LARGEST_CACHE", decoding.cache_bytes(model, 100))
    assert [decoding.layers_timed(model, length) for length in (50, 100, 200, 1000)] == [4, 4, 2, 1]


@pytest.mark.parametrize(("ms", "said"), [(0.5, "under 10"), (1.0, "under 10"), (2.0, "15"), (4.0, "over 20")])
def test_the_crossing_is_between_the_lengths_measured(ms, said):
    assert decoding.crossing(ms, {10: 1.0, 20: 3.0}) == said


def test_a_published_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        contenders.Published(tmp_path / "missing.py")
    pytest.importorskip("torch", reason="the published layer needs PyTorch")
    (tmp_path / "other.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="not the standalone file"):
        contenders.Published(tmp_path / "other.py")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dtyp=float32", r"--layer.dtyp: unknown field; did you mean 'dtype'"),
        ("dtype=float16", r"--layer.dtype='float16': must be one of float32, bfloat16"),
        ("blocks_per_iteration=many", r"--layer.blocks_per_iteration='many': expected int"),
        ("block_size=0", r"--layer.block_size=0: must be at least 1"),
        ("causal", r"--layer=causal: expected field=value"),
        ("layout={[]: 1}", r"--layer.layout='{\[\]: 1}': expected"),
    ],
)
def test_fields_that_are_wrong_are_named(word, message):
    with pytest.raises(UserError, match=message):
        Changes((word,))(CASES["text"])


WRONG = {
    "--suite=all": "--suite=all: must be one of layers, agreement",
    "--cases=text,words": "--cases: there is no 'words'; there are text",
    "--rates=0.5,2": "--rates: must be one or more numbers in 0..1",
    "--rates=half": "--rates: could not convert",
}
ONLY_FOR_TRAINING = ("grain", "array_record", "tensorflow_datasets", "ml_collections", "tensorboardX", "torch", "orbax")
# The error of each word alone, in one process, without what only training needs.
MAIN = f"""
import sys
sys.modules.update(dict.fromkeys({ONLY_FOR_TRAINING}))
from absl.testing import flagsaver
from absl import flags
from experiments import benchmark
from experiments.common.errors import UserError

for word in sys.argv[1:]:
    with flagsaver.flagsaver():
        flags.FLAGS(["benchmark", word])
        try:
            benchmark.main()
        except UserError as error:
            print(error)
"""


@pytest.mark.breadth  # test_fields_that_are_wrong_are_named; tests/test_imports.py
def test_flags_that_are_wrong_are_named_without_the_packages_of_training():
    command = [sys.executable, "-c", MAIN, *WRONG]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for line, message in zip(done.stdout.splitlines(), WRONG.values(), strict=True):
        assert line.startswith(message)


@pytest.mark.breadth  # test_cli.py: test_flags_that_mean_nothing
def test_a_flag_that_is_wrong_is_one_line():
    command = [sys.executable, "-m", "experiments.benchmark", "--suite=all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {WRONG['--suite=all']}")
    assert len(done.stderr.splitlines()) == 1
