"""Measure speed:  python -m experiments.benchmark --suite=layers [--published=FILE] [--cases=text,lm] [--rates=0.5,1]

Times forward and backward of our layers at given activation rates beside their always-active and no-attention forms, a
transformer layer of equal width, and the published PyTorch layer, whose authors' standalone file you name
(renll/SeqBoat; it is run as a program, and needs torch and einops). All in turn, in one process, float32.
docs/performance.md explains the suites.
"""

from collections.abc import Iterable
from pathlib import Path

from absl import flags

from experiments.benchmarks import output
from experiments.benchmarks.cases import CASES
from experiments.benchmarks.suites import SUITES, Settings
from experiments.common import cli, runtime, terminal
from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, user_path

_SUITE = flags.DEFINE_string("suite", "layers", "layers, memory, sparsity, ema, lengths, model, compilation or decode.")
_CASES = flags.DEFINE_list("cases", ["text", "listops", "image", "speech", "lm", "enwik8"], "Which layers.")
_RATES = flags.DEFINE_list("rates", ["0.12", "0.5", "1.0"], "Shares of active elements.")
_PUBLISHED = flags.DEFINE_string("published", None, "The published standalone PyTorch file, to compare with.")
_TRANSFORMER = flags.DEFINE_bool("transformer", True, "Time a transformer layer too, where the suite has layers.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "At least so many rounds of a comparison ...", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "... and at least so many seconds.", lower_bound=0.0)
_KEEP_MEMORY = flags.DEFINE_bool("keep_memory", True, "Keep freed memory for the next step, as the programs do.")
_OUT = flags.DEFINE_string("out", None, "Write OUT.json, and OUT.png for the suite of layers.")


def main() -> None:
    suite, names = _SUITE.value or "", tuple(_CASES.value or ())
    if suite not in SUITES:
        raise UserError(f"--suite={suite}: must be one of {', '.join(SUITES)}")
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--cases: there is no {unknown[0]!r}; there are {', '.join(CASES)}")
    settings = Settings(
        cases=names,
        rates=_rates(_RATES.value or []),
        rounds=_ROUNDS.value or 1,
        seconds=_SECONDS.value or 0.0,
        published=Path(_PUBLISHED.value) if _PUBLISHED.value else None,
        transformer=bool(_TRANSFORMER.value),
    )
    out = user_path(_OUT.value, "--out") if _OUT.value else None
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        refuse_unwritable(out.parent)
    keep_memory = bool(_KEEP_MEMORY.value) and suite != "memory"  # its children do not
    if keep_memory:
        runtime.keep_memory()
    rows: list[output.Row] = []
    for row in SUITES[suite](settings):
        print(output.line(row), flush=True)
        rows.append(row)
    terminal.console(width=160).print(output.table(rows))
    if out:
        for path in output.write(out, suite, rows, keep_memory=keep_memory):
            print(f"written {path}")


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
