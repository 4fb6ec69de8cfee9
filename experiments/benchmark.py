"""Measure speed:  python -m experiments.benchmark --suite=layers [--published=FILE] [--cases=text,lm] [--rates=0.5,1]

Times forward and backward passes of our layers at given activation rates, against their always-active and no-attention
forms, a transformer layer of equal width, and the published PyTorch layer if --published gives its authors' standalone
file (renll/SeqBoat; it is executed, and needs torch and einops). All are timed in turn, in one process. The suite
mixers also times what --sources has: clones of NicolasZucchet/minimal-LRU, lindermanlab/S5 and state-spaces/mamba.
--layer=dtype=bfloat16,blocks_per_iteration=32 changes fields of every case's layer, --batch and --length its size.
docs/performance.md describes the suites.
"""

from collections.abc import Iterable
from pathlib import Path

from absl import flags

from experiments.benchmarks import output
from experiments.benchmarks.cases import CASES
from experiments.benchmarks.settings import Changes, Settings
from experiments.benchmarks.suites import SUITES
from experiments.common import cli, runtime, terminal
from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, user_path

_SUITE = flags.DEFINE_string("suite", "layers", "Suite to run: " + ", ".join(SUITES) + ".")
_CASES = flags.DEFINE_list(
    "cases", ["text", "listops", "image", "speech", "lm", "enwik8"], "Benchmark cases (layers) to time."
)
_RATES = flags.DEFINE_list("rates", ["0.12", "0.5", "1.0"], "Activation rates to time at, each in 0..1.")
_LAYER = flags.DEFINE_list("layer", [], "Fields of LayerConfig to change in every case: FIELD=VALUE,...")
_BATCH = flags.DEFINE_integer("batch", None, "Batch size of every case.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", None, "Sequence length of every case.", lower_bound=1)
_DEPTH = flags.DEFINE_integer("depth", None, "Layers of a model, in suites of models.", lower_bound=1)
_PUBLISHED = flags.DEFINE_string("published", None, "Path of the published standalone PyTorch file to compare with.")
_SOURCES = flags.DEFINE_string("sources", None, "Directory of clones to compare mixers with (suite mixers).")
_FORMS = flags.DEFINE_bool(
    "forms", True, "Also time layers with attention everywhere and without, in suites of layers."
)
_TRANSFORMER = flags.DEFINE_bool("transformer", True, "Also time a transformer layer, in suites of layers.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Minimum number of rounds per comparison.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Minimum duration of a comparison in seconds.", lower_bound=0.0)
_KEEP_MEMORY = flags.DEFINE_bool("keep_memory", True, "Keep freed memory for the next step, as training does.")
_PROFILE = flags.DEFINE_string("profile", None, "Directory for a jax.profiler trace of two more steps of each.")
_OUT = flags.DEFINE_string("out", None, "Write the results to OUT.json, and a figure of the layers suite to OUT.png.")


def main() -> None:
    suite, names = _SUITE.value or "", tuple(_CASES.value or ())
    if suite not in SUITES:
        raise UserError(f"--suite={suite}: must be one of {', '.join(SUITES)}")
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--cases: there is no {unknown[0]!r}; there are {', '.join(CASES)}")
    changes = Changes(tuple(_LAYER.value or ()), _BATCH.value, _LENGTH.value)
    settings = Settings(
        cases={name: changes(CASES[name]) for name in names},
        rates=_rates(_RATES.value or []),
        rounds=_ROUNDS.value or 1,
        seconds=_SECONDS.value or 0.0,
        published=Path(_PUBLISHED.value) if _PUBLISHED.value else None,
        sources=Path(_SOURCES.value) if _SOURCES.value else None,
        forms=bool(_FORMS.value),
        transformer=bool(_TRANSFORMER.value),
        changes=changes,
        depth=_DEPTH.value,
        profile=user_path(_PROFILE.value, "--profile") if _PROFILE.value else None,
    )
    out = user_path(_OUT.value, "--out") if _OUT.value else None
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        refuse_unwritable(out.parent)
    keep_memory = bool(_KEEP_MEMORY.value) and suite != "memory"  # its child processes do not
    if keep_memory:
        runtime.keep_memory()
    rows: list[output.Row] = []
    for row in SUITES[suite](settings):
        print(output.line(row), flush=True)
        rows.append(row)
        if out:  # after every row: what was measured outlives a time limit
            output.write(out, suite, rows, keep_memory=keep_memory)
    terminal.console(width=160).print(output.table(rows))
    if out:
        written = [f"{out}.json"]
        if suite == "layers":
            output.draw(rows, Path(f"{out}.png"))
            written.append(f"{out}.png")
        print("wrote " + " and ".join(written))


def _rates(texts: Iterable[str]) -> tuple[float, ...]:
    try:
        rates = tuple(float(text) for text in texts)
    except ValueError as error:
        raise UserError(f"--rates: {error}") from error
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UserError("--rates: must be one or more numbers in 0..1")
    return rates


if __name__ == "__main__":
    cli.run(main)
