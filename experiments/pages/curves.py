"""Draw runs' learning curves:

python -m experiments.pages.curves --out=docs/_data/results/text --run=ours=runs/a --run=base=runs/b

Writes OUT.png and OUT.json: of every run its config, hardware, versions, curve and test result.
"""

from pathlib import Path

from absl import flags

from experiments.common import cli
from experiments.common.errors import UserError
from experiments.evaluation.table import read_run, write

_OUT = flags.DEFINE_string("out", None, "Path of the picture and the JSON file, without suffix.", required=True)
_RUNS = flags.DEFINE_multi_string("run", None, "label=workdir, once for every run.", required=True)


def main() -> None:
    runs = {}
    for item in _RUNS.value:
        label, _, workdir = item.partition("=")
        if not workdir:
            raise UserError(f"--run={item}: expected label=workdir")
        try:
            runs[label] = read_run(Path(workdir))
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"a file of the run in {workdir} is damaged: {error!r}") from error
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(runs, out)
    print(f"written {out}.json and {out}.png")


if __name__ == "__main__":
    cli.run(main)
