"""The programs at the terminal: a mistake is one line on standard error and exit code 2, never a trace."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from experiments.training.checkpoints import Checkpoints
from experiments.training.metrics import METRICS_FILE
from tests.helpers import grid

REPOSITORY = Path(__file__).parents[2]

# Imports once what all programs import, and runs each command line in a fork of that as `python -m` would.
DRIVER = """
import json, os, resource, runpy, sys, threading, time, traceback
import experiments.training.experiment, experiments.training.loop, experiments.training.restore
import experiments.common.cli, experiments.common.distributed, experiments.evaluation.evaluator
import experiments.evaluation.seeds, experiments.reports.writer, experiments.tasks.listops, configs.quickstart
import matplotlib.pyplot

def child(module, argv, limit, streams):
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
    sys.argv = [module, *argv]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def read(stream, texts, number):
    with os.fdopen(stream) as file:
        texts[number] = file.read()

results = []
for module, argv, limit in json.load(sys.stdin):
    began, texts, pipes = time.monotonic(), ["", ""], [os.pipe(), os.pipe()]
    process = os.fork()
    if process == 0:
        child(module, argv, limit, [write for _, write in pipes])
    readers = []
    for number, (stream, write) in enumerate(pipes):
        os.close(write)
        readers.append(threading.Thread(target=read, args=(stream, texts, number)))
        readers[-1].start()
    for reader in readers:
        reader.join()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    results.append([code, *texts, time.monotonic() - began])
json.dump(results, sys.stdout)
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def environment() -> dict[str, str]:
    """The tests' compilation cache, no proxy of the machine's own settings."""
    cache = os.path.expanduser("~/.cache/seqboat/tests")
    kept = {name: value for name, value in os.environ.items() if name != "TFDS_DATA_DIR"}
    return {**kept, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "COLUMNS": "100"}


def run_all(commands: list[tuple[str, list[str], int | None]], cache: Path | None = None) -> list[Done]:
    """(module, arguments, limit of a file's size) -> what each did. `cache` keeps damage out of that of the tests."""
    command = [sys.executable, "-W", "ignore", "-c", DRIVER]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment() | ({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}),
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [Done(*result) for result in json.loads(done.stdout)]


def program(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{name}", *arguments]


def assert_one_line(done: Done) -> str:
    """The error, without its `error: `."""
    assert done.code == 2, done
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    for noise in ("Traceback", "\\n", "\\'", "config_config"):
        assert noise not in done.err
    return done.err.removeprefix("error: ")


# Command lines: {tmp} is a folder with the files below, {run} a run.

SMALL = [f"--config.task.{split}_examples=40" for split in ("train", "validation", "test")]
QUICK = ["--config=configs/quickstart.py", "--workdir={tmp}/new", *SMALL]
CONFIGS = {
    "syntax.py": "def get_config(:\n",
    "raises.py": "def get_config():\n    return {}['missing']\n",
    "divides.py": "def get_config():\n    return 1 / 0\n",
    "imports.py": "import no_such_package\n",
    "empty.py": "",
    "plain.py": "from configs import base\n\n\ndef get_config():\n    return base.get_config()\n",
}
TRAIN: dict[str, tuple[list[str], str]] = {
    "no config": (["--workdir={tmp}/new"], "--config=FILE is missing"),
    "no workdir": (["--config=configs/quickstart.py"], "--workdir=DIR is missing"),
    "config file missing": (["--config=configs/nothing.py", "--workdir={tmp}/new"], "configs/nothing.py"),
    "config is a directory": (["--config=configs", "--workdir={tmp}/new"], "configs"),
    "syntax error": (["--config={tmp}/syntax.py", "--workdir={tmp}/new"], "syntax.py, line 1: invalid syntax"),
    "config raises": (["--config={tmp}/raises.py", "--workdir={tmp}/new"], "missing"),
    "config divides by zero": (["--config={tmp}/divides.py", "--workdir={tmp}/new"], "division by zero"),
    "config imports": (["--config={tmp}/imports.py", "--workdir={tmp}/new"], "no_such_package"),
    "no get_config": (["--config={tmp}/empty.py", "--workdir={tmp}/new"], "get_config"),
    "unknown field": ([*QUICK, "--config.train.stesp=5"], "unknown field 'stesp' in the config; did you mean 'steps'?"),
    "unknown group": ([*QUICK, "--config.trian.steps=5"], "train"),
    "unknown flag": ([*QUICK, "--wokdir=x"], "Unknown command line flag 'wokdir'. Did you mean: workdir ?"),
    "unexpected argument": ([*QUICK, "train"], "unexpected argument 'train': flags are written --name=value"),
    "wrong type": ([*QUICK, "--config.train.steps=abc"], "--config.train.steps=abc"),
    "float for an int": ([*QUICK, "--config.train.steps=1.5"], "--config.train.steps=1.5"),
    "refused value": (
        [*QUICK, "--config.model.window_size=0"],
        "config.model.window_size=0: must be at least 1, or None for no limit",
    ),
    "none for a number": ([*QUICK, "--config.train.steps=None"], "config.train.steps=None: expected int, got NoneType"),
    "none for an unknown field": (
        [*QUICK, "--config.model.windowsize=None"],
        "unknown field 'windowsize' in the config; did you mean 'window_size'?",
    ),
    "none for a field that may be none": (
        [*QUICK, "--config.model.position=slot", "--config.model.window_size=None"],
        "position='slot' needs a window_size",
    ),
    "infinite limit": (
        [*QUICK, "--config.optimizer.clip_norm=inf"],
        "config.optimizer.clip_norm=inf: must be a finite number of 32 bits, or None for no limit",
    ),
    "endless training": (
        [*QUICK, "--config.train.steps=10000000000"],
        "config.train.steps=10000000000: must be at most 2147483647",
    ),
    "escape sequences": ([*QUICK, "--config.mesh=\x1b[31m"], r"config.mesh='\x1b[31m': there is no mesh axis"),
    "not UTF-8": ([*QUICK[:1], "--workdir={tmp}/\udcff"], r"--workdir={tmp}/\udcff: must be UTF-8"),
    "more seeds than there are": ([*QUICK, "--seeds=99999999999"], "--seeds=99999999999: must be at most 4294967295"),
    "refused seed": ([*QUICK, "--config.seed=-1"], "config.seed=-1: must be in 0..4294967295"),
    "unknown variant": (
        ["--config=configs/lra/text.py:small", "--workdir={tmp}/new"],
        "unknown variant 'small': there are paper, credit_router, tiny, full, always, random, strided, no_attention, "
        "mod, guided, codebook, elman, ema, gru,",
    ),
    "variant of a config without": (["--config={tmp}/plain.py:tiny", "--workdir={tmp}/new"], "this config file has no"),
    "mesh": (
        ["--config=configs/quickstart.py", "--workdir={tmp}/new", "--config.mesh=rows"],
        "config.mesh='rows': there is no mesh axis 'rows'; there are data, fsdp, fsdp_hidden, sequence",
    ),
    "one of many processes": (
        ["--config=configs/quickstart.py", "--workdir={tmp}/new", "--num_processes=2"],
        "--coordinator_address and --process_id missing: runs of several processes need all three flags",
    ),
    "process beyond the last": (
        [*QUICK[:1], "--workdir={tmp}/new", "--num_processes=2", "--process_id=2", "--coordinator_address=a:1"],
        "--process_id=2: must be below --num_processes=2",
    ),
    "address without a port": (
        [*QUICK[:1], "--workdir={tmp}/new", "--num_processes=2", "--process_id=1", "--coordinator_address=a"],
        "--coordinator_address=a: must be HOST:PORT",
    ),
    "data missing": (
        ["--config=configs/lra/text.py", "--workdir={tmp}/new", "--config.data_dir={tmp}/data"],
        "data set 'imdb_reviews/plain_text' is not in {tmp}/data",
    ),
    "init_select alone": (
        [*QUICK[:1], "--workdir={tmp}/init", *SMALL, "--init_select=encoder/**"],
        "--init_select: chooses parameters of --init_from=DIR, which is missing",
    ),
    "init_from nothing": ([*QUICK[:1], "--workdir={tmp}/init", *SMALL, "--init_from={tmp}/nothing"], "{tmp}/nothing"),
}
EVALUATE: dict[str, tuple[list[str], str]] = {
    "no workdir": ([], "workdir"),
    "missing workdir": (["--workdir={tmp}/nothing"], "there is no work directory {tmp}/nothing"),
    "workdir is a file": (["--workdir={tmp}/syntax.py"], "there is no work directory {tmp}/syntax.py"),
    "no checkpoints": (["--workdir={tmp}/data"], "there is no checkpoint directory {tmp}/data/checkpoints"),
    "empty checkpoints": (["--workdir={tmp}/started"], "there is no checkpoint in {tmp}/started/checkpoints yet"),
    "damaged": (["--workdir={tmp}/damaged"], "the checkpoint of step 4 in {tmp}/damaged/checkpoints is damaged"),
    "damaged step": (["--workdir={tmp}/damaged", "--step=4"], "step 4 in {tmp}/damaged/checkpoints is damaged"),
    "foreign": (["--workdir={tmp}/foreign"], "was not written by seqboat"),
    "unknown split": (["--workdir={run}", "--split=dev"], "no evaluation split 'dev'; this task has: validation, test"),
    "unknown step": (["--workdir={run}", "--step=3"], "there is no checkpoint of step 3 in {run}/checkpoints"),
    "negative step": (["--workdir={run}", "--step=-1"], "--step=-1"),
    "step is no number": (["--workdir={run}", "--step=best"], "--step=best"),
    "against nothing": (["--workdir={run}", "--against={tmp}/nothing"], "there is no work directory {tmp}/nothing"),
    "result below a file": (
        ["--workdir={run}", "--out={tmp}/empty.py/x.json"],
        "--out={tmp}/empty.py/x.json: Not a directory",
    ),
    "result in a folder that is not there": (
        ["--workdir={run}", "--out={tmp}/nothing/x.json"],
        "could not write in {tmp}/nothing: No such file or directory",
    ),
    "result at an address": (["--workdir={run}", "--out=gs://bucket/x.json"], "not a URL"),
    "no streams": (["--workdir={run}", "--streams=1"], "short_listops with a Classifier has no streams"),
    "hyper-input NaN": (["--workdir={run}", "--at=nan"], "--at"),
}
REPORT: dict[str, tuple[list[str], str]] = {
    "no workdir": ([], "--workdir=DIR is missing"),
    "missing workdir": (["--workdir={tmp}/nothing"], "there is no work directory {tmp}/nothing"),
    "empty checkpoints": (["--workdir={tmp}/started"], "there is no checkpoint in {tmp}/started/checkpoints yet"),
    "unknown split": (["--workdir={run}", "--split=dev"], "no evaluation split 'dev'; this task has: validation, test"),
    "no examples": (["--workdir={run}", "--examples=0"], "--examples=0"),
    "page in a folder that is not there": (
        ["--workdir={run}", "--out={tmp}/nothing/x.html"],
        "could not write in {tmp}/nothing: No such file or directory",
    ),
}
EXPORT: dict[str, tuple[list[str], str]] = {
    "no workdir": (["--out={tmp}/x.safetensors"], "--workdir=DIR is missing"),
    "no out": (["--workdir={run}"], "--out=FILE is missing: for instance --out=model.safetensors"),
    "another kind of file": (["--workdir={run}", "--out={tmp}/x.npz"], "expected a name that ends with .safetensors"),
    "another file": (["--workdir={run}", "--out={tmp}/other.safetensors"], "exists and is not an export"),
    "in a folder that is not there": (
        ["--workdir={run}", "--out={tmp}/nothing/x.safetensors"],
        "could not write in {tmp}/nothing: No such file or directory",
    ),
    "unknown step": (
        ["--workdir={run}", "--step=3", "--out={tmp}/x.safetensors"],
        "there is no checkpoint of step 3 in {run}/checkpoints",
    ),
    "damaged": (["--workdir={tmp}/damaged", "--out={tmp}/x.safetensors"], "is damaged"),
    "no published form": (
        ["--workdir={run}", "--out={tmp}/x.safetensors", "--names=published"],
        "--names=published: the published model takes numbers",
    ),
    "a foreign file": (["--workdir={tmp}/other.safetensors", "--out={tmp}/x.safetensors"], "cannot be read"),
    "a bucket": (
        ["--workdir=gs://bucket/run", "--out={tmp}/x.safetensors"],
        "not a URL; mount the bucket with gcsfuse",
    ),
}
# The command line of every example is the same.
EXAMPLE: dict[str, tuple[list[str], str]] = {
    "no seeds": (["--seeds=0"], "--seeds=0"),
    "unknown flag": (["--sedes=3"], "Unknown command line flag 'sedes'. Did you mean: seeds ?"),
    "in a folder that is not there": (
        ["--out={tmp}/nothing/x.json"],
        "could not write in {tmp}/nothing: No such file or directory",
    ),
    "a folder": (["--out={tmp}/data"], "--out={tmp}/data: is a directory; name a file"),
}


# A message of what a program calls, whose own test has it: of each program, the test and the cases, which are breadth.
COVERED: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "test_cli.py: test_a_config_file_is_a_program_that_may_do_anything": (
            "config is a directory",
            "config raises",
            "config divides by zero",
            "config imports",
            "no get_config",
        ),
        "the cases `wrong type` and `unknown field`": ("float for an int", "unknown group"),
        "test_config.py: test_mistakes": ("none for a number", "none for an unknown field"),
        "test_config.py: test_mistakes_in_a_model": ("refused value", "none for a field that may be none"),
        "test_config.py: test_mistakes_in_training": ("infinite limit", "endless training", "refused seed"),
        "test_cli.py: the same case": ("variant of a config without",),
        "test_cli.py: test_flags_that_mean_nothing": ("more seeds than there are", "not UTF-8"),
        "test_build.py: test_an_unknown_variant_lists_the_known_ones": ("unknown variant",),
        "parallel/test_steps.py: test_what_cannot_be_split_is_said_before_anything_is_compiled": ("mesh",),
        "test_loop.py: test_init_from_what_is_not_a_run": ("init_from nothing",),
    },
    "evaluate": {
        "the case `damaged`": ("damaged step",),
        "the cases `negative step` and `missing workdir`": ("step is no number", "against nothing"),
        "test_restore.py: test_there_is_no_run": ("workdir is a file", "no checkpoints"),
        "test_checkpoints.py: test_checkpoint_of_another_program": ("foreign",),
        "test_tasks.py: test_an_unknown_split_is_an_error": ("unknown split",),
        "test_evaluation.py: test_a_result_that_cannot_be_kept_is_not_computed": (
            "result below a file",
            "result in a folder that is not there",
        ),
        "test_files.py: test_what_is_refused": ("result at an address",),
        "test_carry.py: test_what_has_no_streams_is_not_evaluated_in_one_pass": ("no streams",),
    },
    "report": {
        "the same cases of evaluate": ("missing workdir", "empty checkpoints"),
        "test_tasks.py: test_an_unknown_split_is_an_error": ("unknown split",),
        "test_report.py: test_a_page_that_cannot_be_written_is_not_measured_for": (
            "page in a folder that is not there",
        ),
    },
    "export": {
        "the same cases of evaluate": ("unknown step", "damaged"),
        "test_exports.py: test_other_files_are_not_overwritten": (
            "another kind of file",
            "another file",
            "in a folder that is not there",
        ),
        "test_exports.py: test_models_without_a_published_form": ("no published form",),
        "test_exports.py: test_files_of_others": ("a foreign file",),
        "test_files.py: test_what_is_refused": ("a bucket",),
    },
}


def cases(module: str, of: dict[str, Any]) -> list[Any]:
    covered = [name for names in COVERED[module].values() for name in names]
    assert not set(covered) - set(of)
    return grid(tuple(of), *(name for name in of if name not in covered))


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, untrained) -> Path:
    tmp = tmp_path_factory.mktemp("programs")
    for step, accuracy in ((2, 0.1), (4, 0.3), (6, 0.2)):
        untrained(tiny(), tmp / "run", step, accuracy=accuracy)
    for name, text in CONFIGS.items():
        (tmp / name).write_text(text)
    (tmp / "other.safetensors").write_text("not an export")
    for name in ("data", "started/checkpoints"):
        (tmp / name).mkdir(parents=True)
    with ocp.CheckpointManager(tmp / "foreign/checkpoints") as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": jnp.ones(3)}))
    copy(tmp / "run", tmp / "kept")
    for step in (2, 4, 6):
        (tmp / f"kept/evaluation_test_{step}.json").mkdir()
    copy(tmp / "run", tmp / "damaged")
    for step in (2, 4, 6):
        state = tmp / f"damaged/checkpoints/{step}/state"
        largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    return tmp


@pytest.fixture(scope="module")
def results(folder, request) -> dict[tuple[str, str], Done]:
    """Of the tests of this session, and of one command more for each other test."""
    chosen = {item.name for item in request.session.items} | {"test_train_refuses[unknown field]"}
    fill = lambda text: text.format(tmp=folder, run=folder / "run")
    asked = [
        (module, name, case[0])
        for module, of in (("train", TRAIN), ("evaluate", EVALUATE), ("report", REPORT), ("export", EXPORT))
        for name, case in of.items()
        if f"test_{module}_refuses[{name}]" in chosen
    ]
    if test_what_cannot_be_kept_is_shown.__name__ in chosen:  # the one that computes something
        asked.append(("evaluate", "a result that cannot be kept", ["--workdir={tmp}/kept"]))
    commands: list[Any] = [
        (f"experiments.{module}", [fill(a) for a in arguments], None) for module, _, arguments in asked
    ]
    examples = [(name, case[0]) for name, case in EXAMPLE.items() if f"test_an_example_refuses[{name}]" in chosen]
    asked += [("example", *each) for each in examples]
    commands += [("examples.counter_current", [fill(a) for a in arguments], None) for _, arguments in examples]
    return {(module, name): done for (module, name, _), done in zip(asked, run_all(commands), strict=True)}


@pytest.mark.parametrize("name", cases("train", TRAIN))
def test_train_refuses(results, folder, name):
    done = results["train", name]
    assert TRAIN[name][1].format(tmp=folder) in assert_one_line(done)
    assert done.out == ""
    assert done.seconds < 30  # at once: no compilation, no download, no retry


def test_no_mistake_leaves_a_work_directory(results, folder):
    assert {code for code, *_ in results.values()} == {2}
    assert not (folder / "new").exists()


@pytest.mark.parametrize("name", cases("evaluate", EVALUATE))
def test_evaluate_refuses(results, folder, name):
    done = results["evaluate", name]
    assert EVALUATE[name][1].format(tmp=folder, run=folder / "run") in assert_one_line(done)
    assert done.out == ""
    assert not list((folder / "run").glob("evaluation_*"))


@pytest.mark.breadth  # test_evaluation.py: test_a_summary_is_shown_though_it_cannot_be_written
def test_what_cannot_be_kept_is_shown(results, folder):
    done = results["evaluate", "a result that cannot be kept"]
    assert f"could not write {folder}/kept/evaluation_test_" in assert_one_line(done)
    assert "Is a directory" in done.err
    assert "accuracy" in done.out
    assert "written" not in done.out


@pytest.mark.parametrize("name", cases("export", EXPORT))
def test_export_refuses(results, folder, name):
    done = results["export", name]
    assert EXPORT[name][1].format(tmp=folder, run=folder / "run") in assert_one_line(done)
    assert done.out == ""
    assert not list(folder.glob("x.*"))


@pytest.mark.parametrize("name", cases("report", REPORT))
def test_report_refuses(results, folder, name):
    done = results["report", name]
    assert REPORT[name][1].format(tmp=folder, run=folder / "run") in assert_one_line(done)
    assert done.out == ""
    assert not list(folder.glob("*/report.*"))


# test_files.py: test_what_is_refused
@pytest.mark.parametrize("name", grid(tuple(EXAMPLE), "no seeds", "unknown flag"))
def test_an_example_refuses(results, folder, name):
    done = results["example", name]
    assert EXAMPLE[name][1].format(tmp=folder) in assert_one_line(done)
    assert done.out == ""
    assert done.seconds < 30  # before anything is computed


@pytest.mark.breadth  # test_terminal.py: test_a_program_ends_as_its_work_did
def test_a_real_process_fails_like_its_forks(results, folder):
    done = subprocess.run(
        program("train", "--config=configs/quickstart.py", "--config.train.stesp=5"),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", results["train", "unknown field"].err)


# A full disk


def arguments_of(tiny: dict[str, Any], workdir: Path, steps: int) -> list[str]:
    leaves = [f"--config.{group}.{name}={tiny[group][name]}" for group in ("task", "train") for name in tiny[group]]
    widths = ("layers", "features", "key_size", "value_size", "window_size", "block_size")
    leaves += [f"--config.model.{name}={tiny['model'][name]}" for name in widths]
    leaves += [f"--config.model.mixer.state_size={tiny['model']['mixer']['state_size']}"]
    leaves += [f"--config.optimizer.warmup_steps={tiny['optimizer']['warmup_steps']}"]
    return ["--config=configs/quickstart.py", f"--workdir={workdir}", *leaves, f"--config.train.steps={steps}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (600, "could not rewrite {tmp}/run/metrics.jsonl: File too large"),
        (3300, "could not save the checkpoint of step 6 to {tmp}/run/checkpoints: File too large; the last good"),
        (8000, "could not save the checkpoint of step 6 to {tmp}/run/checkpoints: File too large; the last good"),
    ],
    ids=["metrics", "every array", "some arrays"],
)
def test_a_full_disk_stops_training_and_the_same_command_resumes(trained, tiny, tmp_path, limit, message):
    """No file may grow beyond a limit, which fails where a full disk does. The compilation cache fails as well."""
    workdir = copy(trained, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    arguments = arguments_of(tiny(), workdir, steps=6)
    commands = [("experiments.train", arguments, limit), ("experiments.train", arguments, None)]
    failed, again = run_all(commands, tmp_path / "cache")
    line = assert_one_line(failed)
    assert line.startswith(message.format(tmp=tmp_path))
    if limit > 600:
        assert "the last good checkpoint is step 4; free some space and run the same command again" in line
    assert again.code == 0
    # What the first could not write of the cache whole is replaced.
    assert ["compiling it again" in line for line in again.err.splitlines()] in ([], [True])
    assert "resuming from step 4" in again.out
    assert "done: step 6" in again.out
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 3, 6]


# What they do


@pytest.mark.slow
def test_train_then_evaluate(tiny, tmp_path):
    began = time.monotonic()
    workdir = tmp_path / "run"
    run = lambda command: subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300
    )
    done = run(program("train", *arguments_of(tiny(), workdir, steps=4)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "done: step 4" in done.stdout
    done = run(program("evaluate", f"--workdir={workdir}", "--split=validation"))
    assert (done.returncode, done.stderr) == (0, "")
    best = Checkpoints(workdir / "checkpoints", best_metric="accuracy", read_only=True).best_step()
    result = json.loads((workdir / f"evaluation_validation_{best}.json").read_text())
    assert f"wrote {workdir}/evaluation_validation_{best}.json" in done.stdout
    logged = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    (expected,) = [record for record in logged if record["kind"] == "evaluation" and record["step"] == best]
    assert {name: result[name] for name in ("loss", "accuracy", "activation_rate")} == {
        name: expected[name] for name in ("loss", "accuracy", "activation_rate")
    }
    assert 0 < result["baseline"]["accuracy"] < 1
    assert result["split"] == "validation"
    assert not list(workdir.glob("*.partial"))
    assert time.monotonic() - began < 300
