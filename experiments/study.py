"""Run a study made of many runs:  python -m experiments.study --study=rotation [--out=docs/_data/hypernetworks/NAME]

    python -m experiments.study --study=dictionaries --workdir=runs/dictionaries --check

A study is a file of experiments/studies with a function `study`, found by its name (`protocol.py`); --study=which lists
them. Rewrites OUT.json after every part, which `python -m experiments.pages.results` renders. Prints the bars, if
there are some; with --check exits with 1 if one is not met.
"""

import sys
from typing import Any

from absl import flags

from experiments.common import cli, distributed, runtime
from experiments.common.files import user_path

_STUDY = flags.DEFINE_string("study", None, "Study to run: a file of experiments/studies.", required=True)
_OUT = flags.DEFINE_string("out", None, "Path of the JSON file without suffix; by default docs/_data/FOLDER/STUDY.")
_SEEDS = flags.DEFINE_integer("seeds", None, "Number of seeds, from the study's first one.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", None, "Training steps per run or per task.", lower_bound=1)
_ARMS = flags.DEFINE_list("arms", None, "Arms to run; by default all.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs; finished runs are reused.")
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1 if a bar is not met.")


def main() -> None:
    runtime.use_compilation_cache()
    runtime.keep_memory()
    from experiments.common.files import refuse_unwritable, write_json
    from experiments.common.provenance import command, hardware, versions
    from experiments.studies import protocol

    name = str(_STUDY.value)
    module = protocol.find_study(name)
    workdir = user_path(_WORKDIR.value, "--workdir") if _WORKDIR.value else None
    given = {"seeds": _SEEDS.value, "steps": _STEPS.value, "arms": _ARMS.value, "workdir": workdir}
    arguments = protocol.arguments(module, given, bool(_CHECK.value))
    if workdir:
        distributed.initialize()  # SIGTERM saves a checkpoint; studies without checkpoints just end
    about = {"command": command(), "versions": versions(), "hardware": hardware()}
    out = user_path(f"{_OUT.value or f'docs/_data/{module.FOLDER}/{name}'}.json", "--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(out.parent)

    def save(result: dict[str, Any]) -> None:
        write_json(out, protocol.stamped(module, result, about))

    bars = module.study(save, **arguments) or []
    print(*map(protocol.verdict, bars), f"wrote {out}", sep="\n")
    if _CHECK.value and not all(bar["met"] for bar in bars):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
