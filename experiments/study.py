"""Run a study made of many runs:  python -m experiments.study --study=rotation [--out=docs/_data/hypernetworks/NAME]

    python -m experiments.study --study=dictionaries --workdir=runs/dictionaries --check

Studies: rotation, noise (experiments/studies/arms.py), pareto_copy, pareto_listops (pareto.py), continual
(continual.py), reach (reach.py; its OUT is in docs/_data/probes), dictionaries (dictionaries.py, planted.py; in
docs/_data/insight). Rewrites OUT.json after every arm; `python -m experiments.pages.results` renders it as a page, and
reach as rows of docs/claims.md. dictionaries prints its bars, and with --check exits with 1 if one is not met.
"""

import dataclasses
import sys
from typing import Any

from absl import flags

from experiments.common import cli, distributed, runtime
from experiments.common.errors import UserError
from experiments.common.files import user_path

NAMES = ("rotation", "noise", "pareto_copy", "pareto_listops", "continual", "reach", "dictionaries")
FOLDERS = {"reach": "probes", "dictionaries": "insight"}  # the others are in hypernetworks

_STUDY = flags.DEFINE_enum("study", None, NAMES, "Study to run.", required=True)
_OUT = flags.DEFINE_string("out", None, "Path of the JSON file without suffix; by default docs/_data/FOLDER/STUDY.")
_SEEDS = flags.DEFINE_integer(
    "seeds", None, "Number of seeds, from 0; by default 5, or 3 for pareto; for dictionaries 3, from 10.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
    "steps", None, "Training steps per run or per task; pareto and dictionaries ignore it.", lower_bound=1
)
_ARMS = flags.DEFINE_list("arms", None, "Arms of rotation or noise to run; by default all.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory for the runs of pareto and dictionaries; finished runs are reused."
)
_CHECK = flags.DEFINE_bool("check", False, "Exit with 1 if a bar of dictionaries is not met.")


def main() -> None:
    runtime.use_compilation_cache()
    runtime.keep_memory()
    name = str(_STUDY.value)
    with_runs = name.startswith("pareto") or name == "dictionaries"
    if with_runs and not _WORKDIR.value:
        raise UserError(f"--workdir=DIR is missing: the directory for the runs of {name}")
    if _CHECK.value and name != "dictionaries":
        raise UserError(f"--check: the study {name} has no bars; remove it")
    if with_runs:
        distributed.initialize()  # SIGTERM saves a checkpoint; the other studies have none and just end
    from experiments.common.files import refuse_unwritable, write_json
    from experiments.common.provenance import command, hardware, versions
    from experiments.studies import arms, continual, dictionaries, pareto, reach

    about = {"command": command(), "versions": versions(), "hardware": hardware()}
    folder = FOLDERS.get(name, "hypernetworks")
    out = user_path(f"{_OUT.value or f'docs/_data/{folder}/{name}'}.json", "--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(out.parent)

    def save(result: dict[str, Any]) -> None:
        write_json(out, {**about, **result})

    met = True
    if name == "dictionaries":
        plan = dictionaries.Plan()
        plan = dataclasses.replace(plan, seeds=plan.seeds[: _SEEDS.value])
        bars = dictionaries.study(plan, user_path(str(_WORKDIR.value), "--workdir"), save)
        met = all(bar["met"] for bar in bars) or not _CHECK.value
        print(*map(dictionaries.verdict, bars), sep="\n")
    elif name.startswith("pareto"):
        pareto.study(name, range(_SEEDS.value or 3), user_path(str(_WORKDIR.value), "--workdir"), save)
    elif name == "reach":
        reach.study(range(_SEEDS.value or 5), about, lambda table: write_json(out, table))
    elif name == "continual":
        continual.study(range(_SEEDS.value or 5), _STEPS.value or 500, save)
    else:
        arms.study(name, _ARMS.value, range(_SEEDS.value or 5), _STEPS.value or 800, save)
    print(f"wrote {out}")
    if not met:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
