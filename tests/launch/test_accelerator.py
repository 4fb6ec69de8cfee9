"""launch/accelerator.sh with a fake python: order, limits, resuming, stopping at a wrong result, packing."""

import json

import pytest

SCRIPT = "launch/accelerator.sh"
CHECKS = ["kernels", "kernels_bfloat16", "agreement", "agreement_pallas"]
TIMED = ["language_model", "language_model_pallas", "layers_pallas", "layers_32", "layers_1", "layers_128", "ema"]
LAST = ["language_model_autotuned", "layers_command_buffers", "language_model_float32"]
# As the benchmark: rows in the file of --out. The collector is the real one, of the standard library.
BEHAVIOUR = """
case "$1 ${2-}" in
  "-m experiments.benchmarks.device") [[ ! ${DEVICELESS-} || ${3-} ]] ;;
  "-m experiments.benchmarks.collect") cd "$ROOT" && exec "$REAL" "$@" ;;
  "-m experiments.benchmark")
    for argument; do case $argument in --out=*) out=${argument#*=} ;; esac; done
    if [[ ${out##*/} == "${WRONG-}" ]]; then echo "error: dk differs"; exit 2; fi
    if [[ ${out##*/} == "${SLOW-}" ]]; then exec sleep 30; fi
    about='"hardware": "h", "device_kind": "d", "versions": {}, "command": "c"'
    printf '{%s, "rows": [{"case": "lm"}]}' "$about" >"$out.json" ;;
esac
"""


@pytest.fixture
def accelerator(machine):
    """accelerator(argument, ..., VARIABLE=value) runs the script: its status, its output, and the results."""
    out = machine.folder / "out"
    machine.behave(BEHAVIOUR)

    def run(*arguments, **environment):
        status, output = machine.run(SCRIPT, f"--out={out}", *arguments, **environment)
        path = out / "results.json"
        return status, output, json.loads(path.read_text())["parts"] if path.exists() else {}

    return run


def parts_run(machine):
    """The parts of the benchmark in the order in which they were started."""
    outs = [next(word for word in call if word.startswith("--out=")) for call in suites(machine)]
    return [word.rsplit("/", 1)[-1] for word in outs]


def suites(machine):
    return [call for call in machine.calls("python") if call[:2] == ["-m", "experiments.benchmark"]]


def test_a_machine_without_a_gpu_is_refused_and_can_rehearse(accelerator):
    status, output, parts = accelerator(DEVICELESS="1")
    assert status == 2
    assert "jax does not start or finds no GPU or TPU" in output
    assert list(parts) == ["environment"]
    assert accelerator("--rehearse", DEVICELESS="1")[0] == 0


def test_checks_come_first_then_times_then_training(machine, accelerator):
    status, output, parts = accelerator("--train=router")
    assert status == 0, output
    assert list(parts) == ["environment", *CHECKS, *TIMED, "published", *LAST, "counters", "train"]
    assert parts_run(machine) == CHECKS + TIMED + LAST
    assert parts["published"]["status"] == parts["counters"]["status"] == "skipped"
    assert parts["published"]["output"] == ["no --published=FILE"]
    assert "published                  skipped: no --published=FILE" in output
    assert parts["kernels"]["rows"] == [{"case": "lm"}]
    calls = machine.calls("python")
    training = next(call for call in calls if call[:2] == ["-m", "experiments.train"])
    assert training[-1] == "--config=configs/synthetic/selective_copy.py:credit_router"
    assert calls[-1][:2] == ["-m", "experiments.pages.accelerator"]
    assert not list((machine.folder / "out").glob("*.log"))
    flags = [flags for _, flags in machine.calls("environment")]
    tuned = [call for call, flag in zip(calls, flags, strict=True) if "autotune_level=0" not in flag]
    assert [call[1] for call in tuned if call[1] != "experiments.benchmarks.collect"] == [
        "experiments.benchmark",
        "experiments.train",
    ]
    buffered = [call for call, flag in zip(calls, flags, strict=True) if "command_buffer=+WHILE" in flag]
    assert [call[1] for call in buffered] == ["experiments.benchmark", "experiments.benchmarks.collect"]


@pytest.mark.breadth  # test_checks_come_first_then_times_then_training
def test_what_is_wrong_is_not_timed_and_what_is_finished_not_run_again(machine, accelerator):
    status, output, parts = accelerator(WRONG="agreement")
    assert status == 1
    assert "agreement failed, so nothing is timed" in output
    assert list(parts) == ["environment", *CHECKS[:3]]
    assert parts["agreement"] == {"status": "failed, status 2", "seconds": 0, "output": ["error: dk differs"]}
    machine.folder.joinpath("python.calls").unlink()
    status, _, parts = accelerator()
    assert status == 0
    assert parts_run(machine) == CHECKS[2:] + TIMED + LAST
    assert parts["agreement"]["status"] == "done"


@pytest.mark.breadth  # test_checks_come_first_then_times_then_training
def test_a_part_without_time_left_does_not_hold_up_the_others(machine, accelerator):
    """A limit of a part, cut by the time kept for training: the slow part ends, and is not a wrong result."""
    short = machine.clone / "launch" / "short.sh"
    text = (machine.clone / SCRIPT).read_text()
    assert "check kernels 90 " in text
    short.write_text(text.replace("check kernels 90 ", "check kernels 1 "))
    short.chmod(0o755)
    try:
        status, output = machine.run("launch/short.sh", f"--out={machine.folder / 'out'}", SLOW="kernels")
    finally:
        short.unlink()
    parts = json.loads((machine.folder / "out" / "results.json").read_text())["parts"]
    assert status == 0, output
    assert parts["kernels"]["status"] == "out of time"
    assert parts["layers_1"]["status"] == parts["train"]["status"] == "done"


def test_one_minute_is_too_short_for_all_but_training(machine, accelerator):
    status, output, parts = accelerator("--minutes=1")
    assert status == 0, output
    assert list(parts) == ["published", "counters", "train"]
    assert output.count("no time left") == 1 + len(CHECKS + TIMED + LAST)


def test_only_some_parts_and_a_rehearsal_that_fails(machine, accelerator):
    status, output, parts = accelerator("--rehearse", "--only=layers_1,ema", WRONG="ema")
    assert status == 1
    assert list(parts) == ["layers_1", "ema"]
    assert "error: failed: ema" in output
    assert all("--length=64" in call for call in suites(machine))


def test_results_are_copied_to_the_folder_of_out(machine, accelerator):
    folder = machine.folder / "back"
    folder.mkdir()
    accelerator("--only=kernels", OUT=str(folder))
    assert json.loads((folder / "results.json").read_text())["parts"]["kernels"]["status"] == "done"
    assert (folder / "log.txt").exists()


def test_packs_wheels_and_installs_them_beside_the_environment(machine, accelerator):
    wheels = machine.folder / "the wheels"
    status, output, _ = accelerator(f"--pack={wheels}", "--python=3.13")
    assert status == 0, output
    download, build = machine.calls("python")
    assert download[:5] == ["-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    assert {"--python-version=3.13", f"--dest={wheels}", "grain", "tensorflow-datasets"} <= set(download)
    assert build == ["-m", "pip", "wheel", "--no-deps", f"--wheel-dir={wheels}", "promise"]
    wheels.mkdir()
    (wheels / "grain.whl").touch()
    accelerator(f"--wheels={wheels}", "--only=environment")
    install = next(call for call in machine.calls("python") if "install" in call)
    assert {"--no-index", "--no-deps", f"--target={wheels / 'site'}", str(wheels / "grain.whl")} <= set(install)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed"], "unknown argument --speed"),
        (["--minutes=soon"], "--minutes=soon: expected a whole number"),
        (["--train=chess"], "--train=chess: must be listops, bytes or router"),
        (["--train=bytes"], "--train=bytes needs --data=FILE"),
        (["--published=missing.py"], "--published=missing.py: there is no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(machine, arguments, message):
    status, output = machine.run(SCRIPT, *arguments)
    assert status == 2
    assert output.startswith(f"error: {message}")
    assert output.count("\n") == 1
    assert machine.calls("python") == []
